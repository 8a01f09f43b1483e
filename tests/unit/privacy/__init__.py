"""Tests of what is not kept and of what does not stay."""
