"""One suite of the store, run on SQLite and, where its programs are installed, on a real PostgreSQL."""
