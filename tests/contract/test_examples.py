"""Every example runs as its docstring says, against a server over the fake engine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from noria.registry import ManifestDraft, Registry
from noria.settings import Settings
from tests.contract.conftest import System, fake_system
from tests.unit.sampling.adapters import write_serving

EXAMPLES = Path(__file__).parents[2] / "examples"


ROLES: dict[str, list[str]] = {
    "chat_image_grpc.py": ["client"],
    "stream_grpc.py": ["client"],
    "preference_grpc.py": ["client", "annotator"],
    "openai_feedback.py": ["client", "annotator"],
    "retrain_watch.py": ["operator"],
}
"""Those that each one's text names."""


@pytest.fixture(scope="module", params=["open", "keyed"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system of its own: jobs are queued here. One asks for keys, and each example has one of its roles."""
    key = "an operator's, of this test" if request.param == "keyed" else None
    with fake_system(tmp_path_factory.mktemp("examples") / "home", key) as system, pytest.MonkeyPatch.context() as env:
        env.delenv("NORIA_API_KEY", raising=False)
        if key is not None:
            with system.store() as store:
                for name, roles in ROLES.items():
                    env.setenv(f"KEY_OF_{name}", store.create_key(name.removesuffix(".py"), roles)[1])
        yield system


def run(name: str, *words: str, status: int = 0) -> str:
    """The example's output."""
    command = [sys.executable, str(EXAMPLES / name), *words]
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    key = environment.get(f"KEY_OF_{name}")
    environment |= {"NORIA_API_KEY": key} if key else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def ports(system: System) -> tuple[str, str]:
    """URL and gRPC address."""
    assert system.fake is not None
    return f"http://127.0.0.1:{system.fake.http_port}", f"127.0.0.1:{system.fake.grpc_port}"


def test_every_example_is_run() -> None:
    """By a test of its own name below."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_is_run"
    }
    assert names == {name.removesuffix(".py") for name in ROLES}
    for name, roles in ROLES.items():
        said = (EXAMPLES / name).read_text().partition("NORIA_API_KEY: a key with the role")[2].splitlines()[0]
        assert said.removeprefix("s").split(" and ") == [f" {roles[0]}", *roles[1:]]


def test_chat_image_grpc(running: System, tmp_path: Path, picture: bytes) -> None:
    assert run("chat_image_grpc.py", ports(running)[1]).startswith("v1 says: ")
    (tmp_path / "a.png").write_bytes(picture)
    assert run("chat_image_grpc.py", ports(running)[1], str(tmp_path / "a.png")).startswith("v1 says: ")


def test_stream_grpc(running: System, free_port: int) -> None:
    assert run("stream_grpc.py", ports(running)[1]).endswith("(5 tokens from v1)\n")
    assert "UNAVAILABLE" in run("stream_grpc.py", f"127.0.0.1:{free_port}", status=1)


def test_preference_grpc(running: System) -> None:
    said = run("preference_grpc.py", ports(running)[1])
    assert "kept as pref_" in said
    assert "refused: INVALID_ARGUMENT, rejected: " in said
    assert running.http.preferences(limit=1)["data"][0]["comment"] == "shorter"


def test_openai_feedback(running: System) -> None:
    said = run("openai_feedback.py", ports(running)[0])
    assert "kept as pref_" in said and "until a training reads it" in said
    newest = running.http.preferences(limit=1)["data"][0]
    assert (newest["source"], newest["chosen"]) == ("edit", {"text": "Blue, mostly."})


def test_retrain_watch(running: System) -> None:
    """A trainer's part and the releaser's are played in the store."""
    id_ = running.http.chat("big or small?", temperature=1, seed=5, n=2)["id"]
    running.http.prefer({"chosen": {"completion_id": id_, "index": 0}, "rejected": {"completion_id": id_, "index": 1}})
    over = threading.Event()
    thread = threading.Thread(target=play_trainer, args=(running, over))
    thread.start()
    try:
        said = run("retrain_watch.py", ports(running)[0])
    finally:
        over.set()
        thread.join(30)
    assert "state {'state': 'succeeded'" in said
    assert said.splitlines()[-1] == "v2 succeeded; before: v1. `noria rollback` takes it back."


def play_trainer(system: System, over: threading.Event) -> None:
    """Takes the job, publishes a version, and lets its rollout succeed."""
    settings = Settings(home=system.home)
    with system.store() as store:
        registry = Registry(settings.models_dir, store)
        while not over.wait(0.05):
            job = store.claim_job("trainer", 60)
            if job is not None:
                staging = registry.begin("made")
                write_serving(staging / "serving")
                made = registry.publish(staging, ManifestDraft(method="dpo", parent="v1", job=job.id)).id
                store.finish_job(job.id, "trainer", "succeeded", version=made)
            rollout = store.claim_rollout("server")
            if rollout is not None:
                registry.promote(rollout.version)
                store.finish_rollout(rollout.id, "succeeded", None, {})
