"""Keeping less while serving: retention in the background, and what is counted of it.

Nothing is imported here, so that each part can be used without the others.
"""
