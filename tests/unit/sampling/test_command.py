"""`noria sample` on the contract suite's fake engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noria.cli.main import call
from noria.cli.sample.prompts import prompts_of
from noria.errors import InvalidRequest
from noria.records import Json
from noria.rewards import ExactOptions
from tests.contract.fake_system import FakeSystem
from tests.unit.evals.files import png
from train.rewards import Sample, build

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSystem]:
    """A system over the fake engine, v1 live."""
    system = FakeSystem(tmp_path / "home")
    system.start()
    yield system
    system.stop()


@pytest.fixture
def run(fake: FakeSystem, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `noria sample`; exit status, output, errors."""
    monkeypatch.delenv("NORIA_URL", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        url = f"http://127.0.0.1:{fake.http_port}"
        code = call(["--home", str(fake.home), "--url", url, "sample", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def lines(text: str) -> list[Json]:
    """One JSON object a line."""
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_s_samples_are_shown(run: Run) -> None:
    code, out, _ = run("--prompt", "which colour?", "-n", "3", "--max-tokens", "4", "--seed", "1")
    assert code == 0
    head, *samples = out.splitlines()
    assert head == "which colour?" and len(samples) == 3
    assert samples[0].split()[:3] == ["0", "4", "tokens"] and samples[0].endswith(" ...")
    assert run("live", "--prompt", "which colour?", "--seed", "1", "--max-tokens", "4", "-n", "3")[1] == out


def test_rows_carry_what_was_sampled_and_what_was_known(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    (tmp_path / "red.png").write_bytes(png("red"))
    asked: list[Json] = [
        {"prompt": "which colour?", "image": "red.png", "answers": ["red"], "level": 3},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    rows.write_text("\n".join(map(json.dumps, asked)))
    code, out, _ = run("v1", "--prompts", str(rows), "-n", "2", "--json")
    assert code == 0
    told = lines(out)
    assert [(one["prompt_index"], one["index"]) for one in told] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {one["version"] for one in told} == {"v1"} and told[0]["fingerprint"].startswith("v1-")
    assert told[0]["answers"] == ["red"] and told[0]["level"] == 3 and "answers" not in told[2]
    assert told[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert told[2]["messages"] == asked[1]["messages"]
    for one in told:
        assert len(one["token_ids"]) == len(one["logprobs"]) == 25 and one["finish_reason"] == "stop"


def test_rewards_are_told_beside_the_samples(run: Run, tmp_path: Path) -> None:
    """By `python -m train rewards`: a row that is right, one that is not."""
    text = lines(run("--prompt", "q", "-n", "1", "--seed", "5", "--json")[1])[0]["text"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "q", "answers": [answer]}) for answer in (text, "nothing")))
    asked = ("--prompts", str(rows), "-n", "1", "--seed", "5", "--reward", "exact")
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    assert [(one["total"], one["parts"]["exact"]) for one in lines(out)] == [(1.0, 1.0), (0.0, 0.0)]
    shown = run(*asked)[1]
    assert "(right: nothing)" in shown and shown.splitlines()[-1] == "mean reward 0.5 over 2 of 2 samples"
    code, _, err = run(*asked[:-1], "no such reward")
    assert code == 2 and "no such reward" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "--prompt TEXT"),
        (("--prompt", "a", "--prompts", "b"), 2, "--prompt TEXT"),
        (("--prompts", "none.jsonl"), 4, "none.jsonl"),
        (("v9", "--prompt", "a"), 4, "v9"),
        (("--prompt", "x" * 300), 2, "every prompt was refused"),
        (("--prompt", "a", "-n", "2", "--temperature", "0"), 2, "temperature 0"),
        (("--prompt", "a", "--image", "none.png"), 2, "none.png"),
    ],
)
def test_what_cannot_be_sampled_says_why(run: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    found, _, err = run(*arguments)
    assert (found, says in err) == (code, True), err


@pytest.mark.parametrize("line", ["{", "[]", '{"question": 3}', '{"answers": ["a"]}'])
def test_a_row_that_is_no_prompt_names_its_line(tmp_path: Path, line: str) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "fine"}\n\n' + line)
    with pytest.raises(InvalidRequest, match=r"prompts\.jsonl:3: "):
        prompts_of(None, [], str(rows), None)


def test_a_set_of_questions_is_asked_with_its_answers() -> None:
    found: list[Any] = prompts_of(None, [], "embedded-text", 3)
    assert len(found) == 3 and all(one.known["answers"] and one.known["metric"] for one in found)
    assert isinstance(found[0].messages[0]["content"], str)


@pytest.mark.parametrize("named", ["embedded", "embedded-text"])
def test_every_question_of_a_set_can_be_judged(named: str) -> None:
    """Those with options and those without, as the reward `exact` reads what is known of them."""
    found = prompts_of(None, [], named, None)
    exact = build(ExactOptions())
    for one in found:
        (right,) = exact(
            [Sample(one.messages, one.known["answers"][0], answers=tuple(one.known["answers"]), extra=one.known)]
        )
        assert right == 1.0


def test_a_row_s_options_are_shown_and_its_prompt_may_be_messages(tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "u"}]
    rows.write_text("\n".join(map(json.dumps, ({"prompt": "Which?", "options": ["red", "blue"]}, {"prompt": asked}))))
    with_options, plain = prompts_of(None, [], str(rows), None)
    assert with_options.messages[0]["content"].startswith("Which?\n(A) red\n(B) blue\n")
    assert with_options.known == {"options": ["red", "blue"]}
    assert plain.messages == asked
