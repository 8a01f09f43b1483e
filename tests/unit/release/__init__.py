"""Tests of serve.release against a small written engine."""
