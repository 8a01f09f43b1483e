"""`noria sample`: groups of answers of a version, to look at."""
