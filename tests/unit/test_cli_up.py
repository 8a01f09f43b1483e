"""`noria up` as a process: it builds a model when there is none, keeps both halves up, and leaves nothing behind.

The halves are small written programs named `serve` and `train` on PYTHONPATH, so that no engine is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import noria
from noria.store import Store
from tests.unit.test_cli_supervisor import eventually, lives

TRAIN = """
    import os, sys, time
    from noria.registry import Base, ManifestDraft, Registry
    from noria.settings import load_settings
    from noria.store import Store
    home = load_settings().home
    with (home / "train.log").open("a") as log:
        log.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\\n")
    if sys.argv[1:2] == ["model"]:
        name = "embedded" if "embedded" in sys.argv else sys.argv[sys.argv.index("--name") + 1]
        if name == "broken":
            sys.exit(6)
        with Store.open(load_settings().store_url) as store:
            registry = Registry(load_settings().models_dir, store)
            folder = registry.begin(name)
            (folder / "weights").write_text(name)
            base = Base(name=name, path=f"masters/{name}")
            made = registry.publish(folder, ManifestDraft(base=base, method="import", architecture="llava"))
            if registry.live() is None:
                registry.promote(made.id)
        sys.exit(0)
    time.sleep(120)
"""
SERVE = """
    import json, os, socket, sys, time
    from noria.settings import load_settings
    home = load_settings().home
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    with (home / "serve.log").open("a") as log:
        log.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\\n")
    port = int(flags["--http-port"]) or 45678
    told = {"url": f"http://127.0.0.1:{port}", "grpc": "127.0.0.1:45679", "pid": os.getpid(), "version": "v1"}
    (home / "ready.tmp").write_text(json.dumps(told))
    (home / "ready.tmp").rename(home / "server.json")
    time.sleep(120)
"""


class Up:
    """One `noria up` on one home."""

    def __init__(self, home: Path, *flags: str) -> None:
        halves = home.parent / "halves"
        for name, code in (("serve", SERVE), ("train", TRAIN)):
            (halves / name).mkdir(parents=True, exist_ok=True)
            (halves / name / "__init__.py").touch()
            (halves / name / "__main__.py").write_text(textwrap.dedent(code))
        self.home = home
        command = [sys.executable, "-m", "noria", "--home", str(home), "up", "--http-port", "0", *flags]
        found = os.pathsep.join((str(halves), str(Path(noria.__file__).parents[1])))  # this checkout's `noria`
        environment = {**os.environ, "PYTHONPATH": found}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def log(self, half: str) -> list[str]:
        """One line a start: the arguments that it got."""
        return [line.partition(" ")[2] for line in self._lines(half)]

    def pids(self, half: str) -> list[int]:
        """The process of each start."""
        return [int(line.split()[0]) for line in self._lines(half)]

    def ready(self) -> dict[str, Any]:
        """What the server wrote."""
        eventually(lambda: (self.home / "server.json").exists() and bool(self._lines("train")))
        told: dict[str, Any] = json.loads((self.home / "server.json").read_text())
        return told

    def stop(self) -> None:
        """Waits until it is up, then ends it as an operator would."""
        begun = len(self._lines("serve"))
        assert self.process.stdout is not None
        assert self.process.stdout.readline() != ""
        eventually(lambda: len(self._lines("train")) > 0 and len(self._lines("serve")) >= max(begun, 1))
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0

    def _lines(self, half: str) -> list[str]:
        file = self.home / f"{half}.log"
        return file.read_text().splitlines() if file.exists() else []


def checkpoint(home: Path, name: str) -> str:
    """A folder that may be taken in."""
    folder = home.parent / "checkpoints" / name
    folder.mkdir(parents=True)
    return str(folder)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    for half in ("serve", "train"):  # should the test have failed, nothing may stay
        log = tmp_path / "home" / f"{half}.log"
        for line in log.read_text().splitlines() if log.exists() else []:
            if lives(int(line.split()[0])):
                os.kill(int(line.split()[0]), signal.SIGKILL)


def test_it_builds_the_embedded_model_once_then_serves_and_stops_clean(home: Path) -> None:
    up = Up(home)
    eventually(lambda: up.log("train") == ["model embedded", ""])
    told = up.ready()
    assert up.process.stdout is not None
    assert up.process.stdout.readline().startswith("noria is up: http://127.0.0.1:45678/v1 (OpenAI)")
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(20) == 0
    assert not any(lives(pid) for pid in [told["pid"], *up.pids("train")])
    again = Up(home)
    eventually(lambda: len(up.log("serve")) == 2)
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(20) == 0
    assert up.log("train")[:2] == ["model embedded", ""]
    assert "model embedded" not in up.log("train")[2:]


def test_a_killed_server_comes_back_on_the_same_ports(home: Path) -> None:
    up = Up(home, "--json")
    first = up.ready()["pid"]
    assert up.process.stdout is not None
    assert "{" in up.process.stdout.readline()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(up.log("serve")) == 2)
    assert "--http-port 0" in up.log("serve")[0]
    assert "--http-port 45678" in up.log("serve")[1]
    assert "--grpc-port 45679" in up.log("serve")[1]
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(20) == 0


def test_a_second_up_on_one_home_is_refused(home: Path) -> None:
    up = Up(home)
    up.ready()
    second = Up(home)
    _, said = second.process.communicate(timeout=20)
    assert second.process.returncode == 5
    assert "already runs on" in said
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(20) == 0


def test_a_model_that_cannot_be_built_ends_it(home: Path) -> None:
    up = Up(home, "--model", checkpoint(home, "broken"))
    _, said = up.process.communicate(timeout=20)
    assert up.process.returncode == 6
    assert "the model was not built (status 6)" in said
    assert up.log("serve") == []


def test_a_checkpoint_is_taken_in_once_and_a_rollout_since_then_holds(home: Path) -> None:
    llava = checkpoint(home, "llava")
    up = Up(home, "--model", llava)
    up.stop()
    assert up.log("train")[0] == f"model add {llava} --name llava"
    assert up.log("serve")[0].endswith("--model llava")
    again = Up(home, "--model", llava)
    again.stop()
    assert len([line for line in again.log("train") if line]) == 1
    assert "--model" not in again.log("serve")[1]


def test_another_checkpoint_is_taken_in_beside_the_first_and_served(home: Path) -> None:
    Up(home).stop()
    other = Up(home, "--model", checkpoint(home, "qwen"))
    other.stop()
    assert other.log("serve")[1].endswith("--model qwen")
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        assert [one.id for one in store.list_versions()] == ["v1", "v2"]
    back = Up(home, "--model", "v1")
    back.stop()
    assert back.log("serve")[2].endswith("--model v1")


def test_a_model_that_is_nowhere_is_said(home: Path) -> None:
    up = Up(home, "--model", "/models/none")
    _, said = up.process.communicate(timeout=20)
    assert up.process.returncode == 4
    assert said == "noria: /models/none is neither a folder nor a hub id like org/name\n"


def test_a_version_that_does_not_exist_starts_nothing(home: Path) -> None:
    up = Up(home, "--model", "v9")
    _, said = up.process.communicate(timeout=20)
    assert up.process.returncode == 4
    assert "v9" in said
    assert up.log("serve") == up.log("train") == []
