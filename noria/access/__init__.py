"""Keys, roles and the audit's lines as plain values; what both the server and the command line say of them."""
