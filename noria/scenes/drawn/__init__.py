"""Drawn scenes: what they hold, how they look, what can be asked about them."""
