"""The doors of the server: HTTP and gRPC over the same handlers."""
