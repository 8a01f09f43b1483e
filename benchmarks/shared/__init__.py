"""What several measurements use; nothing here runs by itself."""
