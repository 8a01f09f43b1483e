"""`noria doctor`: proves that the installation can serve and train, or says what to do."""
