"""What is not kept, and what does not stay: redaction before storing, retention after.

Nothing is imported here: redaction's library is loaded where the settings ask for it.
"""
