"""The wheel turns once, through the public interfaces alone: real vLLM, TRL and gptqmodel on a tiny random VLM."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from openai import OpenAI
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from noria.client import NoriaClient
from noria.demo.processes import running_system
from noria.v1 import operator_pb2, operator_pb2_grpc

SETTINGS = {
    "NORIA_TRAIN__MIN_PAIRS": "4",
    "NORIA_TRAIN__DPO__EPOCHS": "1",
    "NORIA_TRAIN__MODULES__LANGUAGE_MODEL__LEARNING_RATE": "0.001",
    "NORIA_TRAIN__VERIFY__MAX_KL": "5",
    "NORIA_ENGINE__MAX_MODEL_LEN": "256",
    "NORIA_ENGINE__KV_CACHE_GIB": "0.5",
}
COLOURS = ("red", "green", "blue", "yellow")


@dataclass
class System:
    """A running `noria up` on the tiny model."""

    home: Path
    url: str
    client: OpenAI
    noria: NoriaClient

    def ask(self, prompt: str, *, colour: str | None = None, **more: Any) -> Any:
        """One chat request, with a picture of one colour where asked for."""
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if colour is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture(colour)}})
        messages: Any = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="noria", messages=messages, max_tokens=12, **more)

    def server_pid(self) -> int:
        """The server process that now answers."""
        return int(json.loads((self.home / "server.json").read_text())["pid"])


def picture(colour: str) -> str:
    """A data URL of a 48x48 PNG."""
    data = io.BytesIO()
    Image.new("RGB", (48, 48), colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.fixture(scope="module")
def system(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """`noria up --model TINY` on free ports, with the trainer."""
    home = tmp_path_factory.mktemp("loop") / "home"
    with ExitStack() as stack:
        up = running_system(
            home, log=home.parent / "noria.log", console=Console(quiet=True), model=str(tiny_vlm), settings=SETTINGS
        )
        url = stack.enter_context(up)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        yield System(home, url, client, stack.enter_context(NoriaClient(url)))


@pytest.fixture(scope="module")
def turned(system: System) -> dict[str, Any]:
    """The finished job of one turn: 12 questions asked, judged, trained on, and the result put live."""
    before = system.ask("Say something.", temperature=0).choices[0].message.content
    for number in range(12):
        colour = COLOURS[number % 4] if number % 3 == 0 else None
        answer = system.ask(f"Question {number}?", colour=colour, n=2, temperature=1.0, seed=number, user="u-1")
        sides = [{"completion_id": answer.id, "index": index} for index in (0, 1)]
        system.noria.record_preference(chosen=sides[0], rejected=sides[1], annotator="test")
    job = system.noria.create_job(method="dpo", settings={}, rollout="direct")
    events = list(system.noria.watch_job(job["id"]))
    return {"before": before, "events": events, **system.noria.job(job["id"])}


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint by name, as bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name).contiguous()
                found[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def test_the_job_ran_every_stage_and_v2_is_live(system: System, turned: dict[str, Any]) -> None:
    assert turned["error"] is None
    assert (turned["state"], turned["version"], turned["progress"]) == ("succeeded", "v2", 1.0)
    stages = [event["data"]["stage"] for event in turned["events"] if event["kind"] == "stage"]
    assert [s for i, s in enumerate(stages) if s not in stages[:i]] == [
        "snapshot", "train", "merge", "quantize", "verify", "publish", "rollout",
    ]  # fmt: skip
    status = system.noria.status()
    assert (status["live"], status["serving"], status["previous"]) == ("v2", "v2", "v1")
    assert status["preferences"]["total"] == 12
    answer = system.ask("Say something.")
    assert (answer.system_fingerprint or "").startswith("v2-")


def test_the_tower_and_the_aligner_are_the_same_bytes(system: System, turned: dict[str, Any]) -> None:
    old, new = (tensors(system.home / "models" / version / "serving") for version in ("v1", turned["version"]))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert changed
    assert all(".layers." in name and "vision_tower" not in name and "projector" not in name for name in changed)
    manifests = [json.loads((system.home / "models" / v / "manifest.json").read_text()) for v in ("v1", "v2")]
    assert manifests[0]["frozen"] == manifests[1]["frozen"]
    assert set(manifests[1]["frozen"]) == {"vision_tower", "aligner"}
    assert manifests[1]["parent"] == "v1"


def test_the_steps_were_reported_with_their_losses(turned: dict[str, Any]) -> None:
    steps = [e["data"] for e in turned["events"] if e["kind"] == "metrics" and "loss" in e["data"]]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=2e-2)  # ln 2: the policy starts as the reference
    assert [step["step"] for step in steps] == sorted(step["step"] for step in steps)


def test_operators_see_the_same_over_grpc_and_the_command_line(system: System, turned: dict[str, Any]) -> None:
    address = json.loads((system.home / "server.json").read_text())["grpc"]
    with grpc.insecure_channel(address) as channel:
        status = operator_pb2_grpc.OperatorServiceStub(channel).GetStatus(operator_pb2.GetStatusRequest(), timeout=20)
    assert (status.live, status.previous) == ("v2", "v1")
    command = [sys.executable, "-m", "noria", "versions", "--json"]
    environment = {**os.environ, "NORIA_HOME": str(system.home), "NORIA_URL": system.url}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert {one["id"]: one["state"] for one in json.loads(printed)} == {"v1": "retired", "v2": "live"}
    assert turned["version"] == "v2"


def test_a_rollback_brings_the_first_answers_back(system: System, turned: dict[str, Any]) -> None:
    rollout = system.noria.rollback()
    assert system.noria.wait_rollout(rollout["id"])["state"] == "succeeded"
    assert system.noria.status()["live"] == "v1"
    answer = system.ask("Say something.", temperature=0)
    assert (answer.system_fingerprint or "").startswith("v1-")
    assert answer.choices[0].message.content == turned["before"]


def test_kill_9_after_an_acknowledged_preference_loses_nothing(system: System, turned: dict[str, Any]) -> None:
    answer = system.ask("The last question?", n=2, temperature=1.0, seed=99)
    sides = [{"completion_id": answer.id, "index": index} for index in (1, 0)]
    acknowledged = system.noria.record_preference(chosen=sides[0], rejected=sides[1], annotator="test")
    dead = system.server_pid()
    os.kill(dead, signal.SIGKILL)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and system.server_pid() == dead:
        time.sleep(0.5)
    url = json.loads((system.home / "server.json").read_text())["url"]
    with NoriaClient(url) as noria:
        assert acknowledged["id"] in {one["id"] for one in noria.preferences(limit=100)}
        assert noria.status()["serving"] == "v1"
    assert turned["state"] == "succeeded"
