"""`python -m tests.soak`: 200 clients that stream for three minutes from a real engine, then clients that dawdle.

Comes in: how many clients, how long. Goes out: two tables, or JSON, and exit code 1 where an answer was lost, something
grew beyond its bound, a client was passed over, or dawdlers stopped others. The server is our own, on the tiny model.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from noria.records import Json
from tests.servers import publish_tiny, start_server
from tests.soak.run import Plan, soak


def show(told: Json, console: Console) -> None:
    """The tables."""
    for part in ("crowd", "dawdlers"):
        table = Table(title=told[part]["title"])
        table.add_column("what")
        table.add_column("seen")
        for name, value in told[part].items():
            if name != "title":
                table.add_row(name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        console.print(table)
    checks = Table(title="promises")
    checks.add_column("promise")
    checks.add_column("kept")
    for promise, kept in told["promises"].items():
        checks.add_row(promise, "yes" if kept else "NO")
    console.print(checks)


def main() -> int:
    """Runs it; the exit code."""
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=plan.clients, help=f"at once (default {plan.clients})")
    parser.add_argument("--seconds", type=float, default=plan.seconds, help=f"(default {plan.seconds:g})")
    parser.add_argument("--dawdlers", type=int, default=plan.dawdlers, help=f"of each kind (default {plan.dawdlers})")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    asked = parser.parse_args()
    plan = Plan(clients=asked.clients, seconds=asked.seconds, dawdlers=asked.dawdlers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that our server ends with us
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        publish_tiny(home)
        with start_server(home, **plan.environment) as server:
            told = soak(server, plan)
    print(json.dumps(told, indent=2)) if asked.json else show(told, Console())
    return 0 if all(told["promises"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
