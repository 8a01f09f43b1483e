"""What sampling costs users, and what it gets: times to first token, tokens per second, by how it is made to give way.

Comes in: a home whose live version is copied and served (`--home`), else a tiny random VLM. Goes out: tables.
Each row is one server: how vLLM schedules, whether there is room for policy adapters, how many samples may run beside
users. On each: users alone (a saturated engine's tokens/s, and times to first token of users who pause between their
questions), sampling alone, and both. Servers run one after the other, `--rounds` times over, in alternating order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from noria.registry import Registry
from noria.sampling import Drawing, SamplingPool
from noria.store import Store
from tests.flow.policies import picture, write_lora
from tests.servers import publish_tiny, start_server

GROUP, SAMPLE_TOKENS = 8, 64
ANSWER_TOKENS = 32
SATURATING = 8
PAUSE_S = 0.5  # mean of a user's pause between an answer and the next question
LENGTH, SEQUENCES = 512, 16


@dataclass(frozen=True)
class Case:
    """One server. `beside` is `sampling.beside_users`."""

    name: str
    policy: str = "priority"
    adapters: int = 0
    beside: int | None = None

    def environment(self) -> dict[str, str]:
        """The settings."""
        settings = {
            "NORIA_ENGINE__MAX_MODEL_LEN": str(LENGTH),
            "NORIA_ENGINE__MAX_NUM_SEQS": str(SEQUENCES),
            "NORIA_ENGINE__POLICY_ADAPTERS": str(self.adapters),
            "NORIA_CAPTURE__DEFAULT": "false",
        }
        if self.policy != "priority":
            settings["NORIA_ENGINE__ARGS"] = json.dumps([f"--scheduling-policy={self.policy}"])
        if self.beside is not None:
            settings["NORIA_SAMPLING__BESIDE_USERS"] = str(self.beside)
        return settings


CASES = (
    Case("no adapters, first come first served", policy="fcfs", beside=SEQUENCES),
    Case("no adapters, priority, never set back", beside=SEQUENCES),
    Case("no adapters, priority, 1 beside users", beside=1),
    Case("adapters, 0 beside users", adapters=1, beside=0),
    Case("adapters, 1 beside users", adapters=1, beside=1),
    Case("adapters, 4 beside users", adapters=1, beside=4),
    Case("adapters, never set back", adapters=1, beside=SEQUENCES),
)


@dataclass
class Seen:
    """What one case showed, a value a round; times in seconds, rates in tokens/s."""

    saturated: list[float] = field(default_factory=list)
    alone: list[list[float]] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    sampling_beside: list[float] = field(default_factory=list)


def prepared(home: Path, source: Path | None) -> None:
    """A home with one live version: the copy of another's, or a tiny one."""
    if source is None:
        publish_tiny(home)
        return
    with Store.open(f"sqlite:///{source / 'noria.db'}") as store:
        live = store.live()
    if live is None:
        raise SystemExit(f"nothing is live in {source}")
    shutil.copy(source / "noria.db", home / "noria.db")
    shutil.copytree(source / "models" / live, home / "models" / live)


def live_serving(home: Path) -> tuple[str, Path]:
    """The version that will serve, and its checkpoint."""
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        registry = Registry(home / "models", store)
        version = store.live() or "v1"
        return version, registry.path(version) / "serving"


def question(number: int) -> list[dict[str, Any]]:
    """Every second one shows a picture."""
    text = {"type": "text", "text": f"Question {number}: what is there to see, and why?"}
    shown = {"type": "image_url", "image_url": {"url": picture((number * 37 % 256, number * 91 % 256, 120))}}
    return [{"role": "user", "content": [shown, text] if number % 2 else [text]}]


async def one_answer(http: httpx.AsyncClient, number: int) -> tuple[float, int]:
    """Seconds to the first token of a streamed answer that is read to its end, and its tokens."""
    body = {"model": "noria", "messages": question(number), "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    started, first, tokens = time.perf_counter(), 0.0, 0
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/chat/completions", json={**body, **streaming}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - started
    return first, tokens


async def users(url: str, clients: int, pause_s: float, seconds: float) -> tuple[list[float], float]:
    """Times to first token of `clients` who pause for `pause_s` on average, and all their tokens per second."""
    times: list[float] = []
    tokens, until, started = 0, time.monotonic() + seconds, time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:

        async def user(number: int) -> None:
            nonlocal tokens
            drawn, turn = random.Random(number), 0  # noqa: S311  a user's pauses
            while time.monotonic() < until:
                first, said = await one_answer(http, number * 10_000 + turn)
                times.append(first)
                tokens += said
                turn += 1
                if pause_s:
                    await asyncio.sleep(drawn.expovariate(1 / pause_s))

        await asyncio.gather(*(user(number) for number in range(clients)))
    return times, tokens / (time.monotonic() - started)


@contextmanager
def sampling(url: str, adapter: str | None) -> Iterator[None]:
    """Groups, one after the other, for as long as the block runs."""
    over = threading.Event()

    def prompts() -> Iterator[list[dict[str, Any]]]:
        number = 0
        while not over.is_set():
            number += 1
            yield question(number)

    def work() -> None:
        with SamplingPool([url], concurrency=3, timeout_s=1800) as pool:
            for _ in pool.sample(prompts(), Drawing(n=GROUP, max_tokens=SAMPLE_TOKENS), adapter=adapter):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def sampled(url: str) -> float:
    """The tokens that the server has sampled."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("noria_sampling_tokens_total"))


def measure(case: Case, home: Path, lora: Path | None, seen: Seen, seconds: float, clients: int) -> None:
    """One server's round."""
    version, _ = live_serving(home)
    with start_server(home, **case.environment()) as server:
        adapter = "bench" if case.adapters and lora is not None else None
        if adapter is not None and lora is not None:
            with SamplingPool([server.url]) as pool:
                pool.put_adapter(adapter, lora, version, ttl_s=86_400)
        asyncio.run(users(server.url, SATURATING, 0.0, min(10.0, seconds)))  # warm
        seen.saturated.append(asyncio.run(users(server.url, SATURATING, 0.0, seconds))[1])
        seen.alone.append(asyncio.run(users(server.url, clients, PAUSE_S, seconds))[0])
        with sampling(server.url, adapter):
            time.sleep(5.0)
            before, started = sampled(server.url), time.monotonic()
            time.sleep(seconds)
            seen.sampling.append((sampled(server.url) - before) / (time.monotonic() - started))
            before, started = sampled(server.url), time.monotonic()
            seen.beside.append(asyncio.run(users(server.url, clients, PAUSE_S, seconds))[0])
            seen.sampling_beside.append((sampled(server.url) - before) / (time.monotonic() - started))


def percentile(times: list[list[float]], share: int) -> float:
    """The share-th percentile over all rounds, in milliseconds."""
    every = [one for part in times for one in part]
    return 1000 * statistics.quantiles(every, n=100)[share - 1]


def show(seen: dict[str, Seen]) -> None:
    """The table."""
    table = Table(title=f"groups of {GROUP} x {SAMPLE_TOKENS} tokens; medians of the rounds; first tokens in ms")
    columns = ("server", "users, saturated", "first token alone, p50/p95", "beside sampling, p50/p95", "p95 rises by")
    for column in (*columns, "sampling alone", "beside users"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, one in seen.items():
        alone, beside = percentile(one.alone, 95), percentile(one.beside, 95)
        table.add_row(
            name,
            f"{statistics.median(one.saturated):.1f} tok/s",
            f"{percentile(one.alone, 50):.0f} / {alone:.0f}",
            f"{percentile(one.beside, 50):.0f} / {beside:.0f}",
            f"{100 * (beside / alone - 1):+.0f} %",
            f"{statistics.median(one.sampling):.1f} tok/s",
            f"{statistics.median(one.sampling_beside):.1f} tok/s",
        )
    Console(width=180).print(table)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="a home whose live version is measured; default: a tiny random VLM")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--users", type=int, default=2, help="users who pause between questions (default 2)")
    parser.add_argument("--only", default="", help="only servers whose name contains this")
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.only in case.name]
    seen = {case.name: Seen() for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        prepared(home, asked.home)
        _, serving = live_serving(home)
        lora = write_lora(serving, Path(folder) / "lora", 0) if any(case.adapters for case in cases) else None
        for turn in range(asked.rounds):
            for case in cases if turn % 2 == 0 else reversed(cases):
                measure(case, home, lora, seen[case.name], asked.seconds, asked.users)
        show(seen)


if __name__ == "__main__":
    main()
