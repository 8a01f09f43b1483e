"""Samples for a trainer: groups of answers from the live version or from a policy adapter, below the users' traffic.

Nothing is imported here, so that light modules stay light.
"""
