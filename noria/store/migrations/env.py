"""What Alembic runs around the migrations: they use the connection, and the transaction, that the store gives.

Comes in: `config.attributes["connection"]`. Must not open a connection of its own.
"""

from __future__ import annotations

from alembic import context

from noria.store.tables import metadata


def run() -> None:
    """Runs the migrations that are due."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
    context.run_migrations()


if __name__ == "env_py":  # the name that Alembic gives this file when it runs it
    run()
