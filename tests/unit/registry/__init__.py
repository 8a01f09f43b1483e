"""What lies in files: the registry's versions and the blobs."""
