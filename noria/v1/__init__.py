"""Stubs generated from `proto/noria/v1` by `make proto`: the wire's messages and services. Not edited."""
