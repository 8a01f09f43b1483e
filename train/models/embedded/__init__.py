"""The model that Noria brings along: SmolLM2-135M behind a small CLIP tower, assembled here and trained by a recipe."""

EMBEDDED = "embedded"
"""The master that sees."""
BLANK = "embedded-blank"
"""The master that its recipe starts from: tower and aligner are still what chance made of them."""
