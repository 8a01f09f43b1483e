"""`noria eval`: the command, the server that it asks, and how its results are shown."""
