"""`python -m train rewards`: rows in, scores out in the same order, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from noria.errors import InvalidRequest
from noria.records import Choice, Completion, Json, Side
from noria.registry import Base, ManifestDraft, Registry
from noria.settings import load_settings
from noria.store import Store
from tests.tiny import build_tiny_vlm
from tests.unit.rewards.judged import pairs
from train.rewards.rows import sample_of


def run(home: Path, words: Sequence[str], rows: Sequence[Any] = ()) -> tuple[int, list[Json], str]:
    """The exit status, the lines on standard output, and standard error."""
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    ended = subprocess.run(
        [sys.executable, "-m", "train", "rewards", *words],
        check=False,
        capture_output=True,
        text=True,
        input=text,
        env={**os.environ, "NORIA_HOME": str(home)},
    )
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr


ROWS: list[Json] = [
    {"messages": [{"role": "user", "content": "2 + 2?"}], "text": "It is 4.", "answer": 4, "id": "a", "index": 0},
    {"prompt": "2 + 2?", "text": "five", "answers": ["4", "four"], "id": "a", "index": 1, "token_ids": [7, 8, 9]},
    {"text": "nobody knows", "finish_reason": "length"},
]


def test_samples_are_scored_in_order(tmp_path: Path) -> None:
    number = '{"name": "exact", "metric": "number", "weight": 2}'
    status, found, said = run(tmp_path, ["--reward", number, "--reward", "repetition"], ROWS)
    assert status == 0, said
    assert found == [
        {"id": "a", "index": 0, "total": 3.0, "parts": {"exact": 1.0, "repetition": 1.0}, "failed": {}},
        {"id": "a", "index": 1, "total": 1.0, "parts": {"exact": 0.0, "repetition": 1.0}, "failed": {}},
        {"total": None, "parts": {"exact": None, "repetition": 1.0}, "failed": {"exact": "no right answer"}},
    ]
    counts = json.loads(said.splitlines()[-1])["rewards"]
    assert counts["exact"] == {"samples": 3, "mean": 0.5, "failed": 1, "reasons": {"no right answer": 1}}


def test_the_settings_rewards_are_the_default_and_are_known_by_label(tmp_path: Path) -> None:
    (tmp_path / "noria.toml").write_text(
        "[train.reward]\nmax_failure_rate = 0.0\nrewards = [\n"
        '    {name = "regex", pattern = "4", label = "four"},\n    {name = "exact", metric = "number"},\n]\n'
    )
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS[:2])) + "\n\n")
    status, found, said = run(tmp_path, [str(file)])
    assert status == 0, said
    assert [one["total"] for one in found] == [2.0, 0.0]
    status, found, _ = run(tmp_path, ["--reward", "four"], ROWS)
    assert [one["parts"] for one in found] == [{"four": 1.0}, {"four": 0.0}, {"four": 0.0}]
    status, found, said = run(tmp_path, [], ROWS)
    assert status == 6
    assert "max_failure_rate" in said


def test_what_a_reward_prints_is_no_result(tmp_path: Path) -> None:
    reward = json.dumps({"name": "python", "function": "tests.unit.rewards.given:by_text"})
    status, found, said = run(tmp_path, ["--reward", reward], [{"text": "print"}])
    assert (status, [one["total"] for one in found]) == (0, [1.0])
    assert "noise" in said
    assert "more noise" in said


@pytest.mark.parametrize(
    ("words", "rows", "status", "told"),
    [
        ([], [], 2, "no reward"),
        (["--reward", "exat"], [], 2, "--reward exat.0: Input tag 'exat'"),
        (["--reward", "regex"], [], 2, "regex.pattern: Field required"),
        (["--reward", "{name"], [], 2, "not JSON"),
        (["--reward", "exact", "--reward", "exact"], [], 2, "two rewards are called 'exact'"),
        (["--reward", "exact"], [{"text": "a", "answer": "a"}, {"txt": "a"}], 2, "standard input, line 2: no 'text'"),
        (["--reward", "exact"], ["not json\n"], 2, "standard input, line 1: not JSON"),
        (["--reward", "exact", "nowhere.jsonl"], [], 4, "nowhere.jsonl cannot be read"),
        (["--reward", '{"name": "length", "high": 4}'], [{"text": "a"}], 5, "no version is live"),
        (["--reward", "preferences", "--model", "v9"], [{"text": "a"}], 4, "no version 'v9'"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(
    tmp_path: Path, words: list[str], rows: list[Any], status: int, told: str
) -> None:
    ended, found, said = run(tmp_path, words, rows)
    assert ended == status
    assert told in said
    assert "Traceback" not in said
    assert found == []


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ([], "row"),
        ({"text": 5}, "text"),
        ({"text": "a", "messages": 5}, "messages"),
        ({"text": "a", "messages": ["hi"]}, "messages"),
        ({"text": "a", "answers": [{}]}, "answers"),
        ({"text": "a", "answer": True}, "answers"),
        ({"text": "a", "tokens": "3"}, "tokens"),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_key(row: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match="here: ") as refused:
        sample_of(row, "here")
    assert refused.value.param == param


def test_a_row_s_other_columns_are_kept() -> None:
    found = sample_of({**ROWS[1], "options": ["x"], "metric": "choice"}, "here")
    assert found.extra == {"id": "a", "index": 1, "options": ["x"], "metric": "choice"}
    assert (found.prompt, found.answers, found.tokens) == ([{"role": "user", "content": "2 + 2?"}], ("4", "four"), 3)
    assert sample_of({"text": "a", "finish_reason": "length"}, "here").cut


def test_preferences_are_learnt_from_the_home_and_scored_by_its_live_model(tmp_path: Path) -> None:
    judged_home(tmp_path)
    (tmp_path / "noria.toml").write_text("[train]\nheld_out = 0.3\n")
    rows = [{"prompt": "what is it, number 1", "text": text} for text in ("a red square", "a blue square", "z" * 3000)]
    short = {"name": "length", "high": 5, "falloff": 10}
    reward = {"name": "preferences", "min_held_out": 5, "min_accuracy": 0.9}
    status, found, said = run(tmp_path, ["--reward", json.dumps(reward), "--reward", json.dumps(short)], rows)
    assert status == 0, said
    liked, other, long = found
    assert liked["parts"]["preferences"] > other["parts"]["preferences"]
    assert liked["parts"]["length"] == 1.0
    assert long["failed"] == {"preferences": "too long"}


def judged_home(home: Path) -> None:
    """A home with a live tiny model and sixty preferences of text alone."""
    build_tiny_vlm(home / "masters" / "tiny")
    settings = load_settings(home=home)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        staging = registry.begin("test")
        (staging / "serving").mkdir()
        draft = ManifestDraft(method="base", base=Base(name="tiny", path="masters/tiny"))
        registry.promote(registry.publish(staging, draft).id)
        for number, pair in enumerate(one for one in pairs(90) if not one.images):
            choices = tuple(
                Choice(at, text, {"role": "assistant", "content": text}, finish_reason="stop")
                for at, text in enumerate((pair.chosen, pair.rejected))
            )
            id_ = f"chatcmpl-{number}"
            store.add_completions([Completion(id_, 1.0, "noria", "v1", pair.messages, {}, pair.prompt_hash, choices)])
            store.add_preference(Side(id_, 0), Side(id_, 1), annotator="ann")
