"""One file a revision, oldest first. A new one sets `down_revision` and becomes `connection.HEAD`."""
