"""The house rules as programs: `python -m tests.checks.NAME` exits 1 and names each breach."""
