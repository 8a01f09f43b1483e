"""Pictures that a request names instead of bringing them: which addresses are called, and how; which files are read."""
