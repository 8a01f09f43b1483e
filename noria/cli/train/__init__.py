"""`noria train`: the trainer as a daemon, or one recipe."""
