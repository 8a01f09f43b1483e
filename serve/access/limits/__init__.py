"""How much of the server a key may use, and how much work may wait: one object that both wires ask.

Nothing is imported here, so that the engine's proxy needs no more than `load`.
"""
