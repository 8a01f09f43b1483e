"""What stands at each wire: it asks `Access` who is calling, and lets in or refuses."""
