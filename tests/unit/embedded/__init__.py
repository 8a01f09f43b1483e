"""The embedded model on tiny stand-ins: its eyes as a file, laid over, described, made again."""
