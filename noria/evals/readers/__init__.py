"""Readers of question files, each of one published format: a path in, questions and bad rows out."""
