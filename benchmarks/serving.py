"""Requests per second of Noria, capture on, against vLLM's own server on the same checkpoint and engine settings.

Comes in: nothing; a tiny random VLM is built. Goes out: a table of ratios, one row per number of clients.
The two run one after the other, in alternating order, so that a machine that drifts favours neither. The tiny model
makes the engine's share small and so the server's share, where the two differ, as large as it gets.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.servers import publish_tiny, start_server

CLIENTS = (1, 8, 32)
REQUESTS = 96
TOKENS = 32
LENGTH = 256
SEQUENCES = 16
READY_S = 240


@contextmanager
def noria(home: Path) -> Iterator[str]:
    """Noria on the home's live version, every completion captured."""
    settings = {"NORIA_ENGINE__MAX_MODEL_LEN": str(LENGTH), "NORIA_ENGINE__MAX_NUM_SEQS": str(SEQUENCES)}
    with start_server(home, **settings) as server:
        yield server.url


@contextmanager
def plain_vllm(home: Path) -> Iterator[str]:
    """vLLM's own server on the same files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = home / "models" / "v1" / "serving"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
    command += ["--served-model-name=noria", "--dtype=bfloat16", "--enforce-eager", "--disable-uvicorn-access-log"]
    command += [f"--max-model-len={LENGTH}", f"--max-num-seqs={SEQUENCES}", f"--kv-cache-memory-bytes={2**30}"]
    with (home / "plain.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM's own server did not start; see {log.name}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def rate(url: str, clients: int) -> float:
    """Requests per second of `clients` that each wait for an answer before they ask again."""
    left = iter(range(REQUESTS))
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def one() -> None:
            for number in left:
                body = {
                    "model": "noria",
                    "messages": [{"role": "user", "content": f"Question {number}?"}],
                    "max_tokens": TOKENS,
                    "ignore_eos": True,
                    "seed": number,
                }
                answer = await client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return REQUESTS / (time.perf_counter() - started)


def measure(url: str) -> dict[int, float]:
    """One warm-up, then the rate at each number of clients."""
    asyncio.run(rate(url, 8))
    return {clients: asyncio.run(rate(url, clients)) for clients in CLIENTS}


def main() -> None:
    """Runs the pairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2, help="how often both servers are measured (default 2)")
    pairs = parser.parse_args().pairs
    seen: dict[str, list[dict[int, float]]] = {"noria": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        publish_tiny(home)
        for turn in range(pairs):
            order = [("noria", noria), ("plain", plain_vllm)]
            for name, server in order if turn % 2 == 0 else reversed(order):
                with server(home) as url:
                    seen[name].append(measure(url))
    table = Table(title=f"requests/s, {TOKENS} tokens each, {pairs} pairs")
    for column in ("clients", "noria", "vLLM's own server", "ratio, each pair", "median"):
        table.add_column(column, justify="right")
    for clients in CLIENTS:
        ours, theirs = ([run[clients] for run in seen[name]] for name in ("noria", "plain"))
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        row = [", ".join(f"{value:.{digits}f}" for value in values) for values, digits in ((ours, 1), (theirs, 1))]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        table.add_row(str(clients), *row, each, f"{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
