"""What guards the connections of both wires, below the requests."""
