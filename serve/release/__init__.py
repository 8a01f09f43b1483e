"""Puts a published version into the running engine: validate, drain, reload, probe, promote; or the old one back."""
