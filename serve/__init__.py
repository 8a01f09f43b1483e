"""The server: vLLM's engine and both wires in one process, capture of what is answered, release of new versions.

Nothing is imported here. Must never import `train`.
"""
