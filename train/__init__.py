"""The trainer: takes preferences from the store and leaves versions in the registry.

Must not import `serve`; the two halves meet at the store and the registry. Imports nothing heavy here.
"""
