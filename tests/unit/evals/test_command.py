"""`noria eval` as a whole: on the contract suite's fake engine, and on a server that misbehaves as it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noria.cli.main import call
from noria.errors import InvalidRequest, Unavailable
from noria.evals import ask
from noria.records import Evaluation
from noria.registry import ManifestDraft, Registry
from noria.store import Store
from tests.contract.fake_system import FakeSystem
from tests.unit.evals.files import png, write, write_lines
from tests.unit.fake_server import Answer, serving, status

Run = Callable[..., tuple[int, str, str]]
CHAT = "POST /v1/chat/completions"
STATUS = "GET /noria/v1/status"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line; exit status, output, errors."""
    monkeypatch.delenv("NORIA_URL", raising=False)
    monkeypatch.setattr(ask, "PAUSES_S", (0.0, 0.0))

    def run(home: Path, *arguments: str, url: str | None = None) -> tuple[int, str, str]:
        code = call(["--home", str(home), *(["--url", url] if url else []), "eval", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSystem]:
    """Everything of a server but vLLM, on v1; it answers five words drawn from the prompt's hash."""
    system = FakeSystem(tmp_path / "home")
    system.start()
    yield system
    system.stop()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with v1 and v2, v1 live, and no server."""
    home = tmp_path / "home"
    home.mkdir()
    with opened(home) as store:
        registry = Registry(home / "models", store)
        for _ in range(2):
            staging = registry.begin("test")
            write(staging / "serving" / "config.json", b"{}")
            registry.publish(staging, ManifestDraft(method="base"))
        registry.promote("v1")
    return home


def opened(home: Path) -> Store:
    """The home's store."""
    return Store.open(f"sqlite:///{home / 'noria.db'}")


def said(text: str, version: str = "v1", **more: Any) -> dict[str, Any]:
    """A chat answer as the wire shapes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return {"id": "c", "system_fingerprint": f"{version}-0a0b", "choices": [choice], "usage": {"completion_tokens": 3}}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two colours, a count, a bad row."""
    write(tmp_path / "red.png", png("red"))
    rows: list[Any] = [
        {"question": "Which colour?", "image": "red.png", "answer": "red", "category": "colour"},
        {"question": "Which colour is the sky?", "answer": "blue", "category": "colour"},
        {"question": "How many?", "answer": 3, "metric": "number", "category": "count"},
        {"question": "Which?"},
    ]
    return write_lines(tmp_path / "questions.jsonl", rows)


def test_the_whole_command_on_the_fake_engine(run: Run, fake: FakeSystem, questions: Path) -> None:
    url = f"http://127.0.0.1:{fake.http_port}"
    code, out, err = run(fake.home, "live", "--set", str(questions), "--set", "embedded-text", "--json", url=url)
    assert code == 0
    mine, text = json.loads(out)["data"]
    assert (mine["version"], mine["set_name"], mine["run"]["through"]) == ("v1", "questions.jsonl", "live")
    assert mine["counts"] == {"questions": 3, "failed": 0, "cut": 0, "bad_rows": 1}
    assert mine["bad_rows"][0]["line"] == 4
    assert mine["sampling"] == {"temperature": 0.0, "max_tokens": 64, "seed": 0}
    assert text["scores"]["n"] == 40
    assert f"{questions}:4: one of 'answer' and 'answers' is needed" in err
    with opened(fake.home) as store:
        assert store.count_completions() == 0  # the operator's default is to keep; the request said no
        kept = store.list_evaluations(version="v1")
        assert [one.set_name for one in kept] == ["embedded-text", "questions.jsonl"]
        answers = store.evaluation_answers(kept[0].id)
    assert len(answers) == 40
    assert all(len(one.answer.split()) == 5 for one in answers)
    assert run(fake.home, "live", "--set", str(questions), url=url)[0] == 0


def test_scores_and_intervals_of_known_answers(run: Run, home: Path, questions: Path) -> None:
    answers: dict[str, Answer] = {STATUS: status(), CHAT: [said("It's red"), said("Blue."), said("three")]}
    with serving(answers) as server:
        code, out, _ = run(home, "v1", "--set", str(questions), "--concurrency", "1", url=server.url)
        bodies = [body for what, body in server.asked if what == CHAT]
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["v1", "on", "questions.jsonl:", "3", "questions,"]
    assert lines[2][:5] == ["all", "66.7", "%", "[20.8,", "93.9]"]
    assert lines[3][:4] == ["colour", "50.0", "%", "[9.5,"]  # "It's red" is not exactly "red"
    assert lines[4][:4] == ["count", "100.0", "%", "[20.7,"]
    assert [body["store"] for body in bodies] == [False] * 3
    assert {body["temperature"] for body in bodies} == {0.0}
    assert [part["type"] for part in bodies[0]["messages"][0]["content"]] == ["image_url", "text"]
    assert bodies[1]["messages"][0]["content"] == "Which colour is the sky?"


def test_a_refused_question_is_wrong_and_counted_and_all_refused_is_an_error(
    run: Run, home: Path, questions: Path
) -> None:
    long = InvalidRequest("the prompt is longer\nthan 256 tokens")
    with serving({STATUS: status(), CHAT: [long, said("blue", finish_reason="length"), said("3")]}) as server:
        code, _, err = run(home, "v1", "--set", str(questions), "--concurrency", "1", url=server.url)
    assert code == 0
    assert "1 of 3 answers were refused by the server and counted as wrong" in err
    assert "1 of 3 answers were cut by --max-tokens" in err
    with opened(home) as store:
        (kept,) = store.list_evaluations()
        first = store.evaluation_answers(kept.id)[0]
    assert (first.score, first.error, first.answer) == (0.0, "the prompt is longer than 256 tokens", "")
    with serving({STATUS: status(), CHAT: long}) as server:
        code, _, err = run(home, "v1", "--set", str(questions), url=server.url)
    assert code == 2
    assert "refused every question" in err
    with opened(home) as store:
        assert len(store.list_evaluations()) == 1


def test_a_busy_server_is_tried_again_and_a_dead_one_is_an_error(run: Run, home: Path, questions: Path) -> None:
    busy = Unavailable("the queue is full")
    answers: dict[str, Answer] = {STATUS: status(), CHAT: [busy, busy, said("red"), said("blue"), said("3")]}
    with serving(answers) as server:
        code, out, _ = run(home, "v1", "--set", str(questions), "--concurrency", "1", "--json", url=server.url)
    assert (code, json.loads(out)["data"][0]["scores"]["score"]) == (0, 1.0)
    with serving({STATUS: status(), CHAT: busy}) as server:
        code, _, err = run(home, "v1", "--set", str(questions), url=server.url)
    assert (code, "the queue is full" in err) == (7, True)
    code, _, err = run(home, "v1", "--set", str(questions), url=server.url)
    assert (code, "does not answer" in err) == (7, True)


def test_another_version_in_the_middle_ends_it_and_nothing_is_kept(run: Run, home: Path, questions: Path) -> None:
    with serving({STATUS: status(), CHAT: [said("red"), said("blue", "v2"), said("3")]}) as server:
        code, _, err = run(home, "v1", "--set", str(questions), "--concurrency", "1", url=server.url)
    assert code == 5
    assert "v2 answered in place of v1" in err
    with opened(home) as store:
        assert store.list_evaluations() == []


def measured(run: Run, home: Path, version: str, questions: Path, *texts: str) -> None:
    """Keeps a result of a version with these answers."""
    answers: list[Any] = [said(text, version) for text in texts]
    with serving({STATUS: status(serving=version), CHAT: answers}) as server:
        assert run(home, version, "--set", str(questions), "--concurrency", "1", url=server.url)[0] == 0


def test_two_versions_side_by_side(run: Run, home: Path, questions: Path) -> None:
    measured(run, home, "v1", questions, "red", "green", "2")
    with serving({STATUS: status(serving="v2"), CHAT: [said(text, "v2") for text in ("red", "blue", "3")]}) as server:
        given = ("v2", "--set", str(questions), "--compare", "v1", "--concurrency", "1")
        code, out, err = run(home, *given, url=server.url)
        assert len([what for what, _ in server.asked if what == CHAT]) == 3  # v1's result was kept
    assert code == 0
    assert "warning" not in err
    assert "questions.jsonl: v2 against v1" in out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line[:1].isalpha()}
    assert (rows["all"], rows["colour"], rows["count"]) == ("+66.7", "+50.0", "+100.0")
    assert "v2 better on 2, worse on 0, the same on 1 questions; sign test p = 0.5" in out
    code, out, _ = run(home, "v2", "--compare", "v1", "--kept", "--json")
    (compared,) = json.loads(out)["compared"]
    assert compared["by_question"] == {"better": 2, "worse": 0, "same": 1, "p": 0.5}
    assert [row["part"] for row in compared["rates"]] == ["all", "colour", "count"]
    assert run(home, "v2", "--kept", "--set", f"jsonl:{questions}")[1].startswith("v2 on questions.jsonl: 3 questions")
    _, out, _ = run(home, "--list", "--set", f"jsonl:{questions}")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["v2", "v1"]
    assert run(home, "--list", "--set", "embedded")[1] == ""


def test_other_questions_under_the_same_name_are_warned_of(run: Run, home: Path, questions: Path) -> None:
    measured(run, home, "v1", questions, "red", "green", "2")
    write_lines(questions, [{"question": "Which colour?", "answer": "red", "category": "colour"}])
    measured(run, home, "v2", questions, "red")
    code, out, err = run(home, "v2", "--compare", "v1", "--kept", "--set", str(questions))
    assert code == 0
    assert "warning: v2 (" in err
    assert "different questions under the name questions.jsonl" in err
    assert "sign test" not in out
    code, out, err = run(home, "--list")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["v2", "v1"]
    assert "warning: questions.jsonl stands for different questions here" in err
    _, out, err = run(home, "v1", "--list", "--json")
    assert [one["version"] for one in json.loads(out)] == ["v1"]
    assert err == ""


def test_another_sampling_is_warned_of(run: Run, home: Path, questions: Path) -> None:
    measured(run, home, "v1", questions, "red", "green", "2")
    with serving({STATUS: status(serving="v2"), CHAT: said("red", "v2")}) as server:
        run(home, "v2", "--set", str(questions), "--max-tokens", "5", url=server.url)
    _, _, err = run(home, "v2", "--compare", "v1", "--kept")
    assert "sampled differently" in err


def test_a_result_is_shown_with_its_answers(run: Run, home: Path, questions: Path) -> None:
    measured(run, home, "v1", questions, "red", "green", "2")
    with opened(home) as store:
        (kept,) = store.list_evaluations()
    code, out, _ = run(home, "--show", kept.id, "--wrong")
    assert code == 0
    assert [line.split()[:4] for line in out.splitlines()[-2:]] == [["2", "0", "blue", "green"], ["3", "0", "3", "2"]]
    _, out, _ = run(home, "--show", kept.id, "--json")
    assert [one["answer"] for one in json.loads(out)["answers"]] == ["red", "green", "2"]
    assert run(home, "--show", "eval_none")[0] == 4


def test_what_cannot_be_asked_for_is_said_in_one_line(run: Run, home: Path, questions: Path) -> None:
    for status_code, part, arguments in (
        (4, "no version 'v9'", ("v9",)),
        (2, "which version?", ()),
        (4, "no set and no file is called 'nothing'", ("v1", "--set", "nothing")),
        (2, "the metrics are", ("v1", "--set", str(questions), "--metric", "bleu")),
        (4, "no result of v1 is kept", ("v1", "--kept")),
        (4, "no result of v1 on embedded is kept", ("v1", "--kept", "--set", "embedded")),
    ):
        code, out, err = run(home, *arguments)
        assert (code, out, part in err, len(err.splitlines())) == (status_code, "", True, 1), arguments
    assert run(home, "--list") == (0, "", "nothing has been evaluated yet; `noria eval live` does it\n")


def test_a_server_aside_that_does_not_start_says_why_and_leaves_nothing(
    run: Run, home: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORIA_ENGINE__FAST_START", "false")
    write(home / "models" / "v2" / "serving" / "config.json", b"changed")
    before = sorted(path.name for path in home.iterdir() if not path.name.startswith("noria.db"))
    code, out, err = run(home, "v2", "--set", str(questions))
    assert (code, out) == (7, "")
    assert "the server for v2 did not come to answer" in err
    assert "v2/serving/config.json" in err
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith("noria.db")) == before


def test_an_evaluation_s_wire_shape_is_its_fields() -> None:
    made = Evaluation("eval_1", "v1", "s", "sha256:0", 1.0, {"temperature": 0.0}, {"score": 1.0})
    assert made.to_wire()["object"] == "evaluation"
    assert set(made.to_wire()) == {"object", *vars(made)}
