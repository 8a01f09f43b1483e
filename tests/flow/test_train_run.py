"""`noria train run`: a recipe from the shell on a tiny model, interrupted, resumed, published; real GPTQ, no server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from noria.records import Json
from tests.unit.stages.material import write_data

RECIPE = """
name = "tiny"
quantize = { calibration_samples = 4 }
verify = { max_kl = 5.0, samples = 2 }

[[stages]]
name = "eyes"
kind = "vision"
data = [{ source = "labels.jsonl" }]
steps = 40
batch_size = 4
micro_batch_size = 2
checkpoint_every = 5

[[stages]]
name = "talk"
kind = "sft"
data = [{ source = "conversations.jsonl" }]
steps = 3
batch_size = 4
max_length = 256
"""


def noria(home: Path, *words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "noria", "--home", str(home), *words]


def call(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(noria(home, *words), capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    """Ours, with this checkout first: `-P` would otherwise find an installed one."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@pytest.fixture(scope="module")
def home(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run") / "home"
    added = call(home, "model", "add", str(tiny_vlm), "--name", "tiny")
    assert added.returncode == 0, added.stderr
    write_data(home.parent)
    (home.parent / "tiny.toml").write_text(RECIPE)
    return home


def events(process: subprocess.Popen[str], until: Any) -> Json:
    """Reads the trainer's lines until one satisfies `until`."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{"):
            told: Json = json.loads(line)
            if until(told):
                return told
    raise AssertionError("the trainer ended before")


def test_a_recipe_is_interrupted_resumed_and_published(home: Path) -> None:
    first = subprocess.Popen(
        noria(home, "train", "run", str(home.parent / "tiny.toml")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    begun = events(first, lambda told: told["event"] == "step" and told["step"] >= 1)
    first.send_signal(signal.SIGSTOP)  # or a fast machine has done the stage before the second command has begun
    assert begun["train_stage"] == "01-eyes"
    again = call(home, "train", "run", str(home.parent / "tiny.toml"))
    assert again.returncode == 5
    assert "one job runs at a time" in again.stderr
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=120)
    assert first.returncode == 130, stderr
    assert "`noria train run --resume` goes on with it" in stderr
    folder = home / "jobs" / begun["job_id"] / "train" / "01-eyes"
    kept = len((folder / "log.jsonl").read_text().splitlines())
    assert (folder / "checkpoints" / f"checkpoint-{kept}" / "whole").is_file()

    rest = call(home, "train", "run", "--resume", "--json")
    assert rest.returncode == 0, rest.stderr
    job = json.loads(rest.stdout)
    assert (job["id"], job["state"], job["version"], job["method"]) == (begun["job_id"], "succeeded", "v2", "recipe")
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 41))

    manifest = json.loads((home / "models" / "v2" / "manifest.json").read_text())
    assert (manifest["parent"], manifest["method"]) == ("v1", "recipe")
    assert {module: told["policy"] for module, told in manifest["modules"].items()} == {
        "vision_tower": "full",
        "aligner": "full",
        "language_model": "lora",
    }
    assert [stage["name"] for stage in manifest["stages"]] == ["eyes", "talk"]
    assert [len(stage["curve"]) for stage in manifest["stages"]] == [40, 3]
    assert all(stage["data"]["sha256"].startswith("sha256:") for stage in manifest["stages"])
    assert manifest["settings"]["recipe"]["stages"][0]["checkpoint_every"] == 5
    assert manifest["calibration"]["samples"][0]["row"].endswith("conversations.jsonl:2")  # the first with a picture
    assert sorted(path.name for path in (home / "models" / "v2" / "adapter").iterdir()) == ["01-eyes", "02-talk"]


def test_a_wrong_recipe_is_told_in_one_line(home: Path) -> None:
    wrong = home.parent / "wrong.toml"
    wrong.write_text(RECIPE.replace("steps = 40", "steps = 40\nbatchsize = 4"))
    told = call(home, "train", "run", str(wrong))
    assert told.returncode == 2
    assert told.stderr == f"noria: {wrong}: stages.eyes.batchsize: unknown key (docs/recipes.md lists them)\n"
    assert call(home, "train", "run").returncode == 2
    assert call(home, "train", "run", str(home / "gone.toml")).returncode == 4
