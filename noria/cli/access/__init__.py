"""`noria keys` and `noria audit`."""
