"""Sampling and servers that come and go: one that is killed and comes back, one that is started for a command alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from noria.sampling import Drawing, Group, SamplingPool
from noria.store import Store
from tests.flow.policies import SMALL, publish_both, write_lora
from tests.servers import start_server

SETTINGS = {**SMALL, "NORIA_ENGINE__POLICY_ADAPTERS": "1"}


def test_a_server_that_is_killed_in_the_middle_and_comes_back(tmp_path: Path, free_port: int) -> None:
    """The pool waits for it, puts the adapter again, and every prompt gets its group; nothing is left behind."""
    home = tmp_path / "home"
    publish_both(home, tmp_path)
    lora = write_lora(tmp_path / "v1", tmp_path / "one", 1)
    prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(12)]
    groups: list[Group] = []
    left = home / "policy-adapters"

    def server() -> Any:
        return start_server(home, f"--http-port={free_port}", **SETTINGS)

    with SamplingPool([f"http://127.0.0.1:{free_port}"], concurrency=2) as pool, ThreadPoolExecutor() as threads:
        with server() as first:
            pool.put_adapter("one", lora, "v1")
            found = pool.sample(prompts, Drawing(n=4, max_tokens=100), adapter="one", version="v1")
            groups.append(next(found))
            first.stop(signal.SIGKILL)
            rest = threads.submit(lambda: groups.extend(found))
        assert len(list(left.glob("*/*"))) == 1  # a kill leaves the folder
        with server() as second:
            rest.result(timeout=240)
            assert sorted(group.prompt for group in groups) == list(range(12))
            assert all(group.error is None and len(group.samples) == 4 for group in groups)
            assert [path.name.partition("-")[2] for path in left.glob("*/*")] == ["one"]
            assert second.stop() == 0  # with the adapter still put
        assert not list(left.glob("*/*"))


def test_a_version_that_is_not_live_is_sampled_aside(tmp_path: Path) -> None:
    """`noria sample v2` starts a server for it, and leaves nothing of it; v1 stays live."""
    home = tmp_path / "home"
    publish_both(home, tmp_path)
    command = [sys.executable, "-m", "noria", "sample", "v2", "--prompt", "the red", "-n", "3", "--max-tokens", "6"]
    rewards = ["--reward", json.dumps({"name": "length", "high": 3}), "--json"]
    environment = {**os.environ, **SMALL, "NORIA_HOME": str(home)}
    done = subprocess.run([*command, *rewards], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and {row["version"] for row in rows} == {"v2"}
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) and row["fingerprint"].startswith("v2-")
        assert isinstance(row["total"], float)
    assert not list(home.glob("aside-*")) and not list((home / "policy-adapters").glob("*"))
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        assert store.live() == "v1"
