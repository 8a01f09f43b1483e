"""Evaluation: metrics, scores, readers of published formats, the command."""
