"""Rewards that ask somebody else: another process, or another server."""
