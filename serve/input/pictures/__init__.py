"""Picture files read as files: what they are, how large, and the same file without what is not pixels."""
