"""What the front door costs: requests a second and p99 beside vLLM's own server, same files, same engine settings.

Comes in: perhaps a home with a live version; else a tiny random VLM is built, whose engine costs so little that the
door's share is as large as it gets. Goes out: a table of ratios, one row per number of clients.

All servers run at once and are asked in turn, in blocks of seconds, each round in another order: what the machine does
meanwhile, it does to all of them. A server that is not asked sleeps. The ratio is that of each round, then the median.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from noria.settings import Settings
from noria.store import Store
from tests.servers import publish_tiny, start_server

REQUESTS = {1: 48, 8: 192, 32: 512}
"""In one block, by the number of clients."""
TOKENS = 32
LENGTH = 256
SEQUENCES = 16
READY_S = 240
PLAIN = "vLLM's own"
LIMITS = {
    "NORIA_LIMITS__REQUESTS_PER_MINUTE": "1000000",
    "NORIA_LIMITS__CONCURRENT_REQUESTS": "1000",
    "NORIA_LIMITS__TOKENS_PER_DAY": "1000000000",
}


@dataclass(frozen=True)
class Arm:
    """A server that is up."""

    url: str
    key: str | None = None


@dataclass
class Block:
    """What one block of requests measured: how many a second, and how long each took."""

    rate: float
    seconds: list[float] = field(repr=False)


@contextmanager
def noria(home: Path, threads: int, *, keyed: bool = False, capture: bool = True) -> Iterator[Arm]:
    """Noria on the home's live version; `keyed` asks for a key and counts everything that can be limited."""
    env = {
        "NORIA_ENGINE__MAX_MODEL_LEN": str(LENGTH),
        "NORIA_ENGINE__MAX_NUM_SEQS": str(SEQUENCES),
        "NORIA_ENGINE__THREADS": str(threads),
        "NORIA_CAPTURE__DEFAULT": str(capture).lower(),
    }
    key = None
    if keyed:
        env |= LIMITS
        with Store.open(Settings(home=home).store_url) as store:
            key = store.create_key("measured", ["client"])[1]
    with start_server(home, **env) as server:
        yield Arm(server.url, key)


@contextmanager
def plain_vllm(model: Path, threads: int, log_to: Path) -> Iterator[Arm]:
    """vLLM's own server on the same files, its engine on so many cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
    command += ["--served-model-name=noria", "--dtype=bfloat16", "--enforce-eager", "--disable-uvicorn-access-log"]
    command += [f"--max-model-len={LENGTH}", f"--max-num-seqs={SEQUENCES}", f"--kv-cache-memory-bytes={2**30}"]
    last = max(os.sched_getaffinity(0))
    same = {"VLLM_CPU_OMP_THREADS_BIND": f"{last - threads + 1}-{last}"}
    same["VLLM_CPU_INT4_W4A8"] = "0"  # as Noria's engine.int8_activations: another accuracy is another engine
    with log_to.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", **same})  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM's own server did not start; see {log.name}")
            time.sleep(0.5)
        yield Arm(url)
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def ask(arm: Arm, clients: int, requests: int) -> Block:
    """One block: clients that each wait for an answer before they ask again."""
    left, seconds = iter(range(requests)), []
    headers = {"authorization": f"Bearer {arm.key}"} if arm.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=arm.url, timeout=300, headers=headers, limits=limits) as client:

        async def one() -> None:
            for number in left:
                body = {
                    "model": "noria",
                    "messages": [{"role": "user", "content": f"Question {number}?"}],
                    "max_tokens": TOKENS,
                    "ignore_eos": True,
                    "seed": number,
                }
                began = time.perf_counter()
                answer = await client.post("/v1/chat/completions", json=body)
                seconds.append(time.perf_counter() - began)
                answer.raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return Block(requests / (time.perf_counter() - started), seconds)


def measure(arms: Mapping[str, Arm], rounds: int, length: float = 1.0) -> dict[int, dict[str, list[Block]]]:
    """The blocks of every arm, by the number of clients, after a warm-up; `length` times as many requests in each."""
    for arm in arms.values():
        asyncio.run(ask(arm, 8, 16))
    seen: dict[int, dict[str, list[Block]]] = {}
    for clients, requests in REQUESTS.items():
        blocks = seen[clients] = {name: [] for name in arms}
        for turn in range(rounds):
            order = random.Random(turn).sample(list(arms), len(arms))  # noqa: S311
            for name in order:
                blocks[name].append(asyncio.run(ask(arms[name], clients, max(clients, int(requests * length)))))
    return seen


def p99(blocks: list[Block]) -> float:
    """In seconds, over all blocks."""
    return statistics.quantiles([one for block in blocks for one in block.seconds], n=100)[98]


def shown(seen: Mapping[int, Mapping[str, list[Block]]], title: str) -> Table:
    """The rates, their ratios to vLLM's own of the same round, and p99."""
    table = Table(title=title)
    for column in ("clients", "server", "requests/s, median", "ratio, lowest to highest", "ratio, median", "p99, ms"):
        table.add_column(column, justify="right")
    table.add_column("p99, ratio", justify="right")
    for clients, blocks in seen.items():
        base = blocks[PLAIN]
        for name, own in blocks.items():
            ratios = [one.rate / other.rate for one, other in zip(own, base, strict=True)]
            row = [str(clients), name, f"{statistics.median(block.rate for block in own):.1f}"]
            row += [f"{min(ratios):.2f} to {max(ratios):.2f}", f"{statistics.median(ratios):.3f}"]
            table.add_row(*row, f"{p99(own) * 1000:.0f}", f"{p99(own) / p99(base):.2f}")
    return table


def main() -> None:
    """Starts the servers, asks them in turn and prints the table."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each server is asked (default 7)")
    own = max(1, cores - 1)
    parser.add_argument("--threads", type=int, default=own, help=f"of each engine; vLLM's own takes {own} here")
    parser.add_argument("--home", type=Path, help="whose live version is served; its copy is used")
    parser.add_argument("--length", type=float, default=1.0, help="of the blocks: times as many requests (default 1)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        homes = {name: Path(folder) / name for name in ("noria", "keyed", "silent")}
        for home in homes.values():
            if asked.home is None:
                home.mkdir()
                publish_tiny(home)
            else:
                shutil.copytree(asked.home, home, ignore=shutil.ignore_patterns("server.json", "*.log", "masters"))
        live = _serving(homes["noria"])
        arms = {
            PLAIN: servers.enter_context(plain_vllm(live, asked.threads, Path(folder) / "plain.log")),
            "Noria, no capture": servers.enter_context(noria(homes["silent"], asked.threads, capture=False)),
            "Noria": servers.enter_context(noria(homes["noria"], asked.threads)),
            "Noria, key and limits": servers.enter_context(noria(homes["keyed"], asked.threads, keyed=True)),
        }
        what = "tiny random model" if asked.home is None else str(asked.home.name)
        title = f"{what}, {TOKENS} tokens an answer, {asked.threads} of {cores} cores an engine, {asked.rounds} rounds"
        Console().print(shown(measure(arms, asked.rounds, asked.length), title))


def _serving(home: Path) -> Path:
    """The folder of the live version, or of the only one."""
    settings = Settings(home=home)
    with Store.open(settings.store_url) as store:
        version = store.live() or "v1"
    return settings.models_dir / version / "serving"


if __name__ == "__main__":
    main()
