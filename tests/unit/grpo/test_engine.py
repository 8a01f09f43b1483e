"""Engine and trainer come and go: what is waited for, what is asked again, what ends a job; no adapter stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from noria.errors import Conflict, LeaseLost, Superseded, TrainingError, Unavailable
from tests.unit.grpo.material import losses, run, settings
from tests.unit.grpo.sampler import TinySampler
from train.stages.spec import Step


@pytest.fixture(scope="module")
def usual(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Two updates that nothing disturbs."""
    _, steps = run(tiny_vlm, TinySampler(tiny_vlm), tmp_path_factory.mktemp("usual"), settings())
    return steps


def test_an_engine_that_dies_is_waited_for_and_only_what_is_missing_asked_again(
    tiny_vlm: Path, usual: list[Step], tmp_path: Path
) -> None:
    """It dies in the middle of the second update's groups, and answers again at the third try."""
    sampler = TinySampler(tiny_vlm)
    seen = {"asked": 0, "down": 0}

    def fail(place: int) -> None:
        seen["asked"] += 1
        if seen["asked"] in (4, 5):  # the second group of the second update, twice
            seen["down"] += 1
            raise Unavailable("nobody answers")

    sampler.fail = fail
    _, found = run(tiny_vlm, sampler, tmp_path, settings(steps=2, wait_s=30.0))
    assert losses(found) == losses(usual)
    assert (seen["down"], found[1].metrics["waits"]) == (2, 2.0)
    assert len(sampler.given) == 4
    assert sampler.loaded == {}


def test_an_engine_that_stays_away_ends_the_job(tiny_vlm: Path, tmp_path: Path) -> None:
    sampler = TinySampler(tiny_vlm)

    def fail(place: int) -> None:
        raise Unavailable("nobody answers")

    sampler.fail = fail
    with pytest.raises(TrainingError, match=r"no engine samples: nobody answers \(waited 0\.3 s") as why:
        run(tiny_vlm, sampler, tmp_path, settings(wait_s=0.3))
    assert (why.value.code, sampler.loaded) == ("no_sampling_engine", {})


def test_cancelling_is_heard_while_waiting(tiny_vlm: Path, tmp_path: Path) -> None:
    sampler, asked = TinySampler(tiny_vlm), threading.Event()

    def fail(place: int) -> None:
        asked.set()
        raise Unavailable("nobody answers")

    def check() -> None:
        if asked.is_set():
            raise LeaseLost("job job_1 is to be cancelled", code="cancelled")

    sampler.fail = fail
    with pytest.raises(LeaseLost, match="cancelled"):
        run(tiny_vlm, sampler, tmp_path, settings(wait_s=600.0), check=check)
    assert sampler.loaded == {}


def test_another_version_that_comes_live_ends_the_job_unless_it_is_rolled_back(
    tiny_vlm: Path, usual: list[Step], tmp_path: Path
) -> None:
    sampler = TinySampler(tiny_vlm)
    tries = iter(range(100))

    def swapped(place: int) -> None:
        if next(tries) == 2:  # in the second update: a rollout, and soon after its rollback
            sampler.live = "v2"
            threading.Timer(0.3, lambda: setattr(sampler, "live", "v1")).start()
            raise Superseded("v2 serves, not v1")

    sampler.fail = swapped
    _, found = run(tiny_vlm, sampler, tmp_path / "back", settings(steps=2, wait_s=30.0))
    assert losses(found) == losses(usual)
    sampler = TinySampler(tiny_vlm, version="v2")
    with pytest.raises(
        Conflict, match=r"does not serve v1, beside which this job trains: .*v2.* roll back to v1"
    ) as why:
        run(tiny_vlm, sampler, tmp_path / "gone", settings(wait_s=0.2))
    assert (why.value.code, sampler.names) == ("base_not_live", [])


def test_a_shelf_that_is_full_is_waited_for(tiny_vlm: Path, tmp_path: Path) -> None:
    """Somebody else's adapter lies there until its lease ends."""
    refused: list[str] = []

    class Full(TinySampler):
        def put_adapter(self, name: str, folder: Path, version: str) -> None:
            if len(refused) < 2:
                refused.append(name)
                raise Conflict("other is loaded and engine.policy_adapters is 1", code="adapters_full")
            super().put_adapter(name, folder, version)

    _, steps = run(tiny_vlm, Full(tiny_vlm), tmp_path, settings(steps=1, wait_s=30.0))
    assert (len(refused), steps[0].metrics["waits"]) == (2, 2.0)

    class Off(TinySampler):
        def put_adapter(self, name: str, folder: Path, version: str) -> None:
            raise Conflict("this server takes no policy adapters", code="adapters_off")

    with pytest.raises(Conflict, match="takes no policy adapters"):
        run(tiny_vlm, Off(tiny_vlm), tmp_path / "off", settings(wait_s=600.0))


def test_sampling_ahead_is_one_update_older_and_otherwise_the_same(
    tiny_vlm: Path, usual: list[Step], tmp_path: Path
) -> None:
    sampler = TinySampler(tiny_vlm)
    grpo = settings(steps=4, overlap=True)
    _, steps = run(tiny_vlm, sampler, tmp_path, grpo)
    assert losses(steps[:1]) == losses(usual[:1])
    assert [step.metrics["staleness"] for step in steps] == [0.0, 1.0, 1.0, 1.0]
    assert [name.rpartition("-")[2] for name in sampler.names] == ["u0", "u1", "u2", "u3"]
    used = [adapter.rpartition("-")[2] for _, _, adapter in sampler.asked if adapter is not None]
    assert used == ["u0"] * 4 + ["u1"] * 2 + ["u2"] * 2
    assert steps[2].metrics["ratio_max"] > 1.01  # the policy has moved since
    assert sampler.loaded == {}


def test_the_engine_gets_new_weights_every_few_updates(tiny_vlm: Path, tmp_path: Path) -> None:
    sampler = TinySampler(tiny_vlm)
    _, steps = run(tiny_vlm, sampler, tmp_path, settings(steps=4, sync_every=2))
    assert [name.rpartition("-")[2] for name in sampler.names] == ["u0", "u2"]
    assert [step.metrics["staleness"] for step in steps] == [0.0, 1.0, 0.0, 1.0]


KILLED = """
import os, sys
from pathlib import Path
from tests.unit.grpo.material import run, settings
from tests.unit.grpo.sampler import TinySampler

class Shared(TinySampler):
    def put_adapter(self, name, folder, version):
        (Path(sys.argv[2]) / "engine" / name).touch()
        super().put_adapter(name, folder, version)
    def delete_adapter(self, name):
        (Path(sys.argv[2]) / "engine" / name).unlink(missing_ok=True)
        super().delete_adapter(name)

folder = Path(sys.argv[2])
sampler = Shared(Path(sys.argv[1]))
steps = int(sys.argv[3])
def heard(step):
    print(step.step, step.loss, flush=True)
def fail(place):
    if len(sampler.names) == 4 and sys.argv[4] == "stall":
        print("in the fourth", flush=True)
        import time; time.sleep(600)
sampler.fail = fail
run(Path(sys.argv[1]), sampler, folder, settings(steps=steps, checkpoint_every=2, max_staleness=0), on_step=heard)
print("done", flush=True)
"""


def test_killed_in_mid_step_it_goes_on_and_no_adapter_is_left(tiny_vlm: Path, tmp_path: Path) -> None:
    """kill -9 of the trainer's process while the engine holds its fourth adapter."""
    (tmp_path / "engine").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}

    def start(mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", KILLED, str(tiny_vlm), str(tmp_path), "5", mode]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    with start("stall") as process:
        assert process.stdout is not None
        first = list(iter_until(process.stdout.readline, "in the fourth"))
        process.send_signal(signal.SIGKILL)
    assert [line.split()[0] for line in first] == ["1", "2", "3"]
    left = [path.name for path in (tmp_path / "engine").iterdir()]
    assert [name.rpartition("-")[2] for name in left] == ["u3"]
    with start("on") as process:
        assert process.stdout is not None
        second = list(iter_until(process.stdout.readline, "done"))
    assert [line.split()[0] for line in second] == ["3", "4", "5"]
    assert second[0] == first[2]  # the third update, made again, is the same
    assert list((tmp_path / "engine").iterdir()) == []
    _, whole = run(tiny_vlm, TinySampler(tiny_vlm), tmp_path / "whole", settings(steps=5, max_staleness=0))
    assert [float(line.split()[1]) for line in second] == losses(whole[2:])


def iter_until(read: Callable[[], str], end: str) -> Any:
    """Lines up to one that is `end`, those of libraries left out."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        line = read()
        if not line or line.strip() == end:
            return
        if line[0].isdigit():
            yield line.strip()
