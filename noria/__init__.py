"""The ground floor of Noria: what both the server and the trainer stand on.

Imports neither torch, vllm nor fastapi, so that the command line stays quick.
"""

__version__ = "0.1.0"
