"""`noria up`: the server and the trainer, kept running together."""
