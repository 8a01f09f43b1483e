"""`python -m tests.fuzz`: ten thousand malformed requests over both wires of a running server.

Comes in: how many, a seed, and the addresses of a server, or none: then one is started on the tiny model. Goes out: a
table of answers by kind, or JSON, and exit code 1 where the server failed: a 5xx but 501 and 503, INTERNAL or UNKNOWN,
no answer in time, a refusal that says nothing, memory that grew beyond the bound, or no answer to a good request at the
end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from noria.records import Json
from tests.contract.doors import GrpcDoor, HttpDoor
from tests.fuzz.cases import about
from tests.fuzz.plan import batches
from tests.fuzz.send import Sender, Tally
from tests.memory import family_mib, rss_mib
from tests.servers import publish_tiny, start_server

LIMIT_S = 60.0
MOST_GROWTH_MIB = 128.0
WARM_SHARE = 0.1
SETTINGS = {"NORIA_ENGINE__MAX_MODEL_LEN": "256", "NORIA_ENGINE__KV_CACHE_GIB": "0.5"}


@dataclass(frozen=True)
class Target:
    """A running server; without a `pid` its memory is not measured."""

    url: str
    grpc: str
    pid: int | None
    api_key: str | None = None


@contextmanager
def target(asked: argparse.Namespace) -> Iterator[Target]:
    """The server that was named, or one of our own."""
    if asked.url:
        yield Target(asked.url, asked.grpc, asked.pid, asked.api_key)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        publish_tiny(home)
        with start_server(home, **SETTINGS) as server:
            yield Target(server.url, server.grpc, server.process.pid)


def fuzz(at: Target, requests: int, seed: int, limit_s: float, console: Console) -> Json:
    """Sends them all; what came of it."""
    doors = (HttpDoor(at.url, at.api_key), GrpcDoor(at.grpc, at.api_key))
    completion_id = doors[0].chat("which?", n=2, seed=1, temperature=1, max_tokens=4, store=True)["id"]
    sender, tally = Sender(at.url, at.grpc, limit_s=limit_s, api_key=at.api_key), Tally()
    began, warm = time.monotonic(), (0.0, 0.0)
    for cases in batches(requests, seed):
        asyncio.run(sender.send([about(case, completion_id) for case in cases], tally))
        if not warm[0] and tally.sent >= WARM_SHARE * requests:
            warm = _memory(at.pid)
        console.print(f"{tally.sent} sent, {tally.failed} failed, {_memory(at.pid)[0]:.0f} MiB", style="dim")
    asyncio.run(sender.send(list(tally.gave_way), tally, alone=True))
    took_s, after = time.monotonic() - began, _memory(at.pid)
    good = [door.chat("still there?", max_tokens=4, temperature=0)["model_version"] for door in doors]
    return {
        "sent": tally.sent,
        "failed": tally.failed,
        "failures": tally.failures,
        "answers": {kind: dict(counts) for kind, counts in sorted(tally.counts.items())},
        "seconds": round(took_s, 1),
        "slowest_s": round(tally.slowest_s, 2),
        "server_mib": {"warm": round(warm[0]), "after": round(after[0]), "most_growth": MOST_GROWTH_MIB},
        "with_engine_mib": {"warm": round(warm[1]), "after": round(after[1])},
        "still_answers": good,
        "passed": not tally.failed and after[0] - warm[0] <= MOST_GROWTH_MIB and len(good) == len(doors),
    }


def _memory(pid: int | None) -> tuple[float, float]:
    """MiB of the server's own process, and with those that it started; zeros where it is not ours to look at."""
    return (rss_mib(pid), family_mib(pid)) if pid else (0.0, 0.0)


def show(told: Json, console: Console) -> None:
    """The table."""
    table = Table(title=f"{told['sent']} malformed requests in {told['seconds']} s, {told['failed']} failed the server")
    for column in ("kind", "sent", "answers"):
        table.add_column(column, justify="right" if column == "sent" else "left")
    for kind, counts in told["answers"].items():
        said = ", ".join(f"{status} {count}" for status, count in sorted(counts.items(), key=lambda one: -one[1]))
        table.add_row(kind, str(sum(counts.values())), said)
    console.print(table)
    mib, whole = told["server_mib"], told["with_engine_mib"]
    console.print(f"slowest answer {told['slowest_s']} s; still answers: {told['still_answers']}")
    console.print(
        f"server's memory {mib['warm']} MiB warm, {mib['after']} after (at most {mib['most_growth']:.0f} more); "
        f"with the engine {whole['warm']} and {whole['after']}"
    )
    for failure in told["failures"]:
        console.print(failure, style="red", markup=False)
    console.print("passed" if told["passed"] else "FAILED")


def main() -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="how many, at least (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default 0)")
    parser.add_argument("--url", help="HTTP address of a running server; default: one is started on the tiny model")
    parser.add_argument("--grpc", help="its gRPC address")
    parser.add_argument("--pid", type=int, help="its process, to watch its memory")
    parser.add_argument("--api-key", help="the bearer key that it asks for")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help=f"longest answer (default {LIMIT_S:g} s)")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    asked = parser.parse_args()
    if bool(asked.url) != bool(asked.grpc):
        parser.error("--url and --grpc belong together")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that our server ends with us
    console = Console(stderr=True)
    with target(asked) as at:
        told = fuzz(at, asked.requests, asked.seed, asked.limit_s, console)
    print(json.dumps(told, indent=2)) if asked.json else show(told, Console())
    return 0 if told["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
