"""`noria eval` on real vLLM: through the running server for the version that is live, aside for the others.

One home with two tiny versions, v1 live. The aside server must leave no trace in the home but the kept result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from noria.cli.context import Place
from noria.cli.eval.servers import aside
from noria.client import NoriaClient
from noria.settings import load_settings
from noria.store import Store
from tests.servers import Server, publish_tiny, start_server

SMALL = {"NORIA_ENGINE__MAX_MODEL_LEN": "256", "NORIA_ENGINE__KV_CACHE_GIB": "0.25"}
COLOURS = ("red", "green", "blue")
QUICK = ("--max-tokens", "8", "--concurrency", "1")  # one at a time: a batch may round otherwise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on v1 of a home that also holds v2, other random weights."""
    home = tmp_path_factory.mktemp("eval") / "home"
    home.mkdir()
    for seed in (0, 1):
        publish_tiny(home, seed=seed)
    with start_server(home, "--model=v1", **SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions with pictures and without, one bad row, and one question that is longer than the context."""
    folder = tmp_path_factory.mktemp("questions")
    rows: list[dict[str, Any]] = [{"question": "Say something.", "answer": "something", "category": "text"}]
    for colour in COLOURS:
        Image.new("RGB", (48, 48), colour).save(folder / f"{colour}.png")
        rows.append({"question": "Which colour?", "image": f"{colour}.png", "answer": colour, "category": "picture"})
    rows.append({"question": "Who?", "image": "missing.png", "answer": "nobody"})
    rows.append({"question": "long " * 400, "answer": "long", "category": "text"})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def noria(server: Server, *arguments: str, status: int = 0) -> tuple[Any, str]:
    """Runs the command on the server's home; its JSON and its standard error."""
    environment = {key: value for key, value in os.environ.items() if key != "NORIA_URL"}
    command = [sys.executable, "-m", "noria", "--home", str(server.home), *arguments, "--json"]
    done = subprocess.run(command, env={**environment, **SMALL}, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return (json.loads(done.stdout) if done.stdout else None), done.stderr


def traces(home: Path) -> dict[str, Any]:
    """Everything that a server could have left behind, besides evaluations."""
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        return {
            "files": sorted(path.name for path in home.iterdir() if not path.name.startswith("noria.db")),
            "told": json.loads((home / "server.json").read_text()),
            "live": (store.live(), store.previous()),
            "states": [version.state for version in store.list_versions()],
            "completions": store.count_completions(),
            "servers": [process.id for process in store.processes("server", fresh_s=1e9)],
            "rollouts": len(store.list_rollouts()),
        }


def test_the_live_version_is_asked_through_the_running_server(server: Server, questions: Path) -> None:
    before = traces(server.home)
    told, errors = noria(server, "eval", "v1", "--set", str(questions), *QUICK)
    (result,) = told["data"]
    assert result["run"]["through"] == "live"
    assert result["run"]["fingerprint"].startswith("v1-")
    assert result["counts"] == {"questions": 5, "failed": 1, "cut": result["counts"]["cut"], "bad_rows": 1}
    assert [(row["line"], "missing.png" in row["reason"]) for row in result["bad_rows"]] == [(5, True)]
    assert f"{questions}:5:" in errors
    assert {name: rate["n"] for name, rate in result["scores"]["categories"].items()} == {"picture": 3, "text": 2}
    kept, _ = noria(server, "eval", "--show", result["id"])
    texts = [one["answer"] for one in kept["answers"]]
    assert all(texts[:4])
    assert "256" in kept["answers"][4]["error"]
    assert traces(server.home) == before  # nothing of it was captured


def test_another_version_is_asked_aside_and_nothing_in_the_home_changes(server: Server, questions: Path) -> None:
    before = traces(server.home)
    told, _ = noria(server, "eval", "v2", "--set", str(questions), *QUICK, "--compare", "v1")
    (result,) = told["data"]
    assert result["run"]["through"] == "aside"
    assert result["run"]["fingerprint"].startswith("v2-")
    (compared,) = told["compared"]
    assert compared["versions"] == ["v2", "v1"]
    assert compared["warning"] is None
    assert traces(server.home) == before
    with NoriaClient(server.url) as client:
        assert client.status()["serving"] == "v1"
    with Store.open(f"sqlite:///{server.home / 'noria.db'}") as store:
        newest = {version: store.list_evaluations(version=version) for version in ("v1", "v2")}
        assert [len(found) for found in newest.values()] == [1, 1]  # v1's kept result was taken, not asked again
        answers = [[one.answer for one in store.evaluation_answers(found[0].id)] for found in newest.values()]
    assert answers[0][:4] != answers[1][:4]  # other weights answered


def test_a_server_aside_has_no_way_to_change_the_home(server: Server) -> None:
    before = traces(server.home)
    settings = load_settings(home=server.home, engine={"max_model_len": 256, "kv_cache_gib": 0.25})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setenv(name, value)
        with aside(Place(server.home), settings, "v2") as told, httpx.Client(base_url=told["url"]) as client:
            asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "store": True}
            answer = client.post("/v1/chat/completions", json=asked, timeout=60).json()
            assert answer["system_fingerprint"].startswith("v2-")
            with client.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}, timeout=60) as stream:
                chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
            assert {chunk["system_fingerprint"] for chunk in chunks} == {answer["system_fingerprint"]}
            assert [client.get(path).status_code for path in ("/noria/v1/status", "/v1/chat/completions")] == [404, 405]
            assert client.post("/noria/v1/rollouts", json={"version": "v2"}).status_code == 404
            assert {one["id"] for one in client.get("/v1/models").json()["data"]} == {"noria", "v2"}
            pid = told["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert traces(server.home) == before


def test_an_evaluation_aside_agrees_with_one_through_the_live_server(server: Server, questions: Path) -> None:
    rollout = NoriaClient(server.url)
    with rollout as client:
        assert client.wait_rollout(client.create_rollout("v2")["id"])["state"] == "succeeded"
    told, _ = noria(server, "eval", "live", "--set", str(questions), *QUICK)
    assert told["data"][0]["run"]["through"] == "live"
    with Store.open(f"sqlite:///{server.home / 'noria.db'}") as store:
        live, aside = store.list_evaluations(version="v2")
        same = [[one.answer for one in store.evaluation_answers(found.id)] for found in (live, aside)]
    assert same[0] == same[1]
    assert live.set_hash == aside.set_hash
