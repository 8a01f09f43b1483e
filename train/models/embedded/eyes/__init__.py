"""The embedded model's eyes: what its recipe trained, as one small folder that travels with Noria.

Comes in: a version that the recipe made. Goes out: the folder, a sighted master, a model card.
`shipped/` is such a folder: package data, which a wheel holds too.
"""
