"""Malformed requests over both wires, and our OpenAPI document held against the server."""
