"""Stages of recipes: order, heads, losses, checkpoints, processes, jobs."""
