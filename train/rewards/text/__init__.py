"""Rewards that look at nothing but an answer's text, and at the right answers where there are some."""
