"""Measurements, side by side with what a user would pick instead; figures are ratios. Run by `make bench`."""
