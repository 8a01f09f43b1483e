"""Alembic's scripts, shipped with the package and run by `Store.open`. Each revision is one file in `versions/`."""
