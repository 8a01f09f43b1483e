"""The demo: the whole loop once, on the embedded model, measured through the live server."""
