"""The gRPC door, package `noria.v1` on the wire: it translates messages and calls the handlers, nothing more."""
