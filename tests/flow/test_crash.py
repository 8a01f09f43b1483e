"""`kill -9` of the trainer in every stage, then a restart, ends in the same version content as an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as Picture

from noria.blobs import Blobs
from noria.records import BLOB_SCHEME, STAGES, Choice, Completion, Job, Json, ProcessInfo, Side
from noria.registry import Registry
from noria.settings import Settings, load_settings
from noria.store import Store

ENVIRONMENT = {
    "NORIA_TRAIN__POLICY__AUTOMATIC": "false",
    "NORIA_TRAIN__MIN_PAIRS": "4",
    "NORIA_TRAIN__LEASE_S": "2",
    "NORIA_TRAIN__POLL_S": "0.1",
    "NORIA_TRAIN__DPO__EPOCHS": "1",
    "NORIA_TRAIN__MODULES__LANGUAGE_MODEL__LEARNING_RATE": "0.001",
    "NORIA_TRAIN__VERIFY__MAX_KL": "5",
    "NORIA_TRAIN__QUANTIZE__CALIBRATION_SAMPLES": "8",
}


@contextmanager
def trainer(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer daemon on `home`, killed at the end; its output goes to trainer.log beside the home."""
    environment = {**os.environ, **ENVIRONMENT, "NORIA_HOME": str(home)}
    with (home.parent / "trainer.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "train"], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def home(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the tiny model as v1 and 16 judged completions, a few with a picture."""
    home = tmp_path_factory.mktemp("crash") / "home"
    environment = {**os.environ, **ENVIRONMENT, "NORIA_HOME": str(home)}
    command = [sys.executable, "-m", "train", "model", "add", str(tiny_vlm), "--name", "tiny"]
    subprocess.run(command, env=environment, check=True, timeout=300)
    settings = load_settings(home=home)
    with Store.open(settings.store_url) as store:
        if store.live() is None:
            store.promote("v1")
        judge(store, settings)
    return home


def judge(store: Store, settings: Settings) -> None:
    """Fills the store as capture and an annotator would."""
    data = BytesIO()
    Picture.new("RGB", (40, 40), "red").save(data, "PNG")
    image = Blobs(settings.blobs_url).put(data.getvalue(), "image/png")
    for number in range(16):
        content: list[Json] = [{"type": "text", "text": f"What is {number}?"}]
        if number % 4 == 0:
            content.insert(0, {"type": "image_url", "image_url": {"url": BLOB_SCHEME + image.sha256}})
        texts = (f"It is {number}.", f"It is {number}, or so they say.")
        message: Json = {"role": "user", "content": content}
        store.add_completions(
            [
                Completion(
                    id=f"chatcmpl-{number}",
                    created_at=1000.0 + number,
                    model="noria",
                    model_version="v1",
                    messages=(message,),
                    params={},
                    prompt_hash=f"hash-{number}",
                    choices=tuple(Choice(i, t, {"role": "assistant", "content": t}) for i, t in enumerate(texts)),
                    images=(image,) if number % 4 == 0 else (),
                )
            ]
        )
        store.add_preference(Side(f"chatcmpl-{number}", 0), Side(f"chatcmpl-{number}", 1), annotator="test")


def wait(store: Store, job_id: str, stage: str | None = None) -> Job:
    """Waits until the job runs `stage`, or, without one, until it ends."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        store.beat(ProcessInfo("a-server", "server", time.time()))  # so that the trainer waits for its rollout
        job = store.get_job(job_id)
        if job.state in ("succeeded", "failed", "cancelled"):
            return job
        if stage is not None and job.state == "running" and job.stage == stage and stage not in job.done:
            return job
        time.sleep(0.005)
    raise AssertionError(f"job {job_id} did not get to {stage or 'its end'}: {store.get_job(job_id)}")


def put_live(store: Store, job: Job) -> None:
    """Does a server's part of the one rollout that `job` asked for."""
    deadline = time.monotonic() + 60
    while (rollout := store.claim_rollout("a-server")) is None:
        assert time.monotonic() < deadline, f"no rollout was asked for: {job}"
        store.beat(ProcessInfo("a-server", "server", time.time()))
        time.sleep(0.05)
    store.promote(rollout.version, rollout.id)


def content(registry: Registry, version: str) -> dict[str, str]:
    """Hashes of everything that the version would serve, its adapter and its probe."""
    return {name: entry.sha256 for name, entry in registry.manifest(version).files.items()}


def test_a_job_killed_in_every_stage_makes_the_same_version(home: Path) -> None:
    settings = load_settings(home=home)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        calm = store.create_job("dpo", {"preferences": "all"}, "none", "test")
        with trainer(home):
            reference = wait(store, calm.id)
        assert (reference.state, reference.error) == ("succeeded", None)

        job = store.create_job("dpo", {"preferences": "all"}, "direct", "test")
        died_in = []
        for stage in STAGES:
            with trainer(home) as process:
                died_in.append(wait(store, job.id, stage).stage)
                process.kill()
                process.wait()
        with trainer(home):
            put_live(store, wait(store, job.id, "rollout"))
            ended = wait(store, job.id)

        assert (ended.state, ended.error) == ("succeeded", None)
        assert died_in == list(STAGES)
        assert ended.attempt == len(STAGES) + 1
        assert reference.version is not None and ended.version is not None
        assert ended.version != reference.version
        registry.verify(ended.version)
        assert content(registry, ended.version) == content(registry, reference.version)
        assert store.live() == ended.version
        assert [one.state for one in store.list_rollouts(10)] == ["succeeded"]
        assert sorted(registry.path("v1").parent.glob(".staging-*")) == []


@pytest.mark.parametrize("stage", ["train", "quantize", "verify"])
def test_a_cancelled_job_leaves_no_version(home: Path, stage: str) -> None:
    settings = load_settings(home=home)
    with Store.open(settings.store_url) as store:
        before = {version.id for version in store.list_versions()}
        job = store.create_job("dpo", {"preferences": "all"}, "none", "test")
        with trainer(home):
            wait(store, job.id, stage)
            store.request_cancel(job.id)
            ended = wait(store, job.id)
        assert ended.state == "cancelled"
        assert {version.id for version in store.list_versions()} == before
