"""Rewards that look at the text alone: values by hand, and against slow references."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from noria.errors import SettingsError, TrainingError
from noria.evals.metrics import score
from noria.evals.questions import METRICS, Question
from noria.records import Json
from noria.rewards import NAMES
from train.rewards import Backing, Failure, Reward, Sample, build
from train.rewards.text.repetition import repeated_share

CATASTROPHE = "a" * 60 + "!"  # (a|aa)+$ tries every way of cutting the letters up


def reward(name: str, backing: Backing | None = None, **options: Any) -> Reward:
    return build(NAMES[name].model_validate({"name": name, **options}), backing)


def value(made: Reward, text: str, answers: tuple[str, ...] = (), extra: Json | None = None, **more: Any) -> Any:
    (found,) = made([Sample([], text, answers=answers, extra=extra or {}, **more)])
    return found


@pytest.mark.parametrize(
    ("options", "text", "answers", "extra", "wanted"),
    [
        ({}, "The Red square.", ("a red square",), {}, 1.0),
        ({}, "a blue square", ("a red square", "red"), {}, 0.0),
        ({"metric": "contains"}, "it is a red square, I think", ("red square",), {}, 1.0),
        ({"metric": "number"}, "there are 3 or rather 4", ("four",), {}, 1.0),
        ({"metric": "number", "tolerance": 0.5}, "2.4", ("2",), {"tolerance": 0.1}, 1.0),
        ({"metric": "number"}, "2.4", ("2",), {"tolerance": 0.5}, 1.0),
        ({"metric": "anls"}, "squares", ("square",), {}, 1 - 1 / 7),
        ({"metric": "yes_no"}, "Yes, it is", ("YES",), {}, 1.0),
        ({}, "The answer is B.", ("blue",), {"options": ["red", "blue"]}, 1.0),
        ({}, "(A)", ("1",), {"options": ["red", "blue"]}, 0.0),
        ({}, "7", ("seven",), {"metric": "number"}, 1.0),
        ({}, "red", ("red",), {"options": []}, 1.0),
        ({"extract": r"<answer>(.*?)</answer>"}, "red <answer>x</answer> <answer> blue </answer>", ("blue",), {}, 1.0),
        ({"extract": r"<answer>(.*?)</answer>"}, "blue", ("blue",), {}, 0.0),
        ({"extract": r"\d+"}, "3 then 5", ("5",), {}, 1.0),
        ({}, "red", (), {}, Failure("no right answer")),
        ({"metric": "choice"}, "A", ("red",), {}, Failure("unreadable right answer")),
        ({"metric": "number"}, "4", ("some",), {}, Failure("unreadable right answer")),
        ({"metric": "yes_no"}, "no", ("maybe",), {}, Failure("unreadable right answer")),
        ({}, "red", ("red",), {"metric": "almost"}, Failure("unknown metric")),
        ({}, "A", ("A",), {"options": {}}, Failure("unreadable options")),
        ({"extract": r"(a|aa)+$", "timeout_s": 0.2}, CATASTROPHE, ("a",), {}, Failure("timeout")),
    ],
)
def test_exact(options: Json, text: str, answers: tuple[str, ...], extra: Json, wanted: Any) -> None:
    found = value(reward("exact", **options), text, answers, extra)
    assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_is_what_an_evaluation_says(metric: str) -> None:
    said = ("B", "yes it is", "a red square", "4", "")
    answers, options = (
        {"choice": ("B",), "yes_no": ("yes",), "number": ("4",)}.get(metric, ("red square",)),
        ("no", "red"),
    )
    shown = {"options": list(options)} if metric == "choice" else {}
    question = Question("", "", answers, metric, options=options if shown else ())  # type: ignore[arg-type]
    made = reward("exact", metric=metric)
    assert [value(made, one, answers, shown) for one in said] == [score(question, one) for one in said]


@pytest.mark.parametrize(
    ("options", "text", "wanted"),
    [
        ({"pattern": "b+c"}, "abbcd", 1.0),
        ({"pattern": "b+c", "whole": True}, "abbcd", 0.0),
        ({"pattern": "(?is)a.b", "whole": True}, "A\nB", 1.0),
        ({"pattern": "^$"}, "", 1.0),
        ({"pattern": "(a|aa)+$", "timeout_s": 0.2}, CATASTROPHE, Failure("timeout")),
    ],
)
def test_regex(options: Json, text: str, wanted: Any) -> None:
    assert value(reward("regex", **options), text) == wanted


@pytest.mark.parametrize(
    ("options", "length", "wanted"),
    [
        ({"low": 3, "high": 5, "falloff": 4}, 3, 1.0),
        ({"low": 3, "high": 5, "falloff": 4}, 5, 1.0),
        ({"low": 3, "high": 5, "falloff": 4}, 6, 0.75),
        ({"low": 3, "high": 5, "falloff": 4}, 9, 0.0),
        ({"low": 3, "high": 5, "falloff": 4}, 90, 0.0),
        ({"low": 3, "high": 5, "falloff": 4}, 0, 0.25),
        ({"high": 5}, 5, 1.0),
        ({"high": 5}, 6, 0.0),
    ],
)
def test_length(options: Json, length: int, wanted: float) -> None:
    assert value(reward("length", unit="characters", **options), "é" * length) == wanted
    assert value(reward("length", **options), "whatever", tokens=length) == wanted


def test_length_counts_with_the_tokenizer_what_the_sampler_did_not(tiny_vlm: Path) -> None:
    from transformers import AutoProcessor

    asked: list[int] = []

    def processor() -> Any:
        asked.append(1)
        return AutoProcessor.from_pretrained(tiny_vlm)

    made = reward("length", Backing(processor=processor), low=2, high=2, falloff=10)
    assert value(made, " red square") == 1.0
    assert value(made, "zzzz") == pytest.approx(0.8)  # four bytes
    assert value(made, "zzzz", tokens=2) == 1.0
    assert asked == [1]
    with pytest.raises(TrainingError, match="unit") as refused:
        value(reward("length", high=2), "x")
    assert refused.value.code == "no_tokenizer"


@pytest.mark.parametrize(
    ("options", "text", "wanted"),
    [
        ({"n": 2}, "a b a b a", 1 - 0.5),  # ab ba ab ba: two of four are new
        ({"n": 2}, "A b, a B!", 1 - 1 / 3),
        ({"n": 1}, "no no no no", 0.25),
        ({"n": 3}, "two words", 1.0),
        ({"n": 2}, "", 1.0),
        ({"n": 2, "unit": "characters"}, "ab ab", 1 - 1 / 3),
        ({"n": 1, "allowed": 0.5}, "no no no no", 0.5),
        ({"n": 1, "allowed": 0.75}, "no no no no", 1.0),
    ],
)
def test_repetition(options: Json, text: str, wanted: float) -> None:
    assert value(reward("repetition", **options), text) == pytest.approx(wanted)


def test_repeated_shares_are_those_of_a_slow_count() -> None:
    drawn = random.Random(0)  # noqa: S311
    for _ in range(200):
        units = [drawn.choice("abc") for _ in range(drawn.randrange(12))]
        n = drawn.randrange(1, 5)
        grams = ["".join(units[at : at + n]) for at in range(len(units)) if at + n <= len(units)]
        again = sum(gram in grams[:at] for at, gram in enumerate(grams))
        assert repeated_share(units, n) == pytest.approx(again / len(grams) if grams else 0.0)


ENGLISH = "The picture shows a red circle on a light background, and beside it a small square."
GERMAN = "Das Bild zeigt einen roten Kreis auf hellem Grund, und daneben ein kleines Quadrat."
JAPANESE = "画像には明るい背景に赤い円があります。"


def test_language_tells_them_apart() -> None:
    made = reward("language", languages=["en", "ja"])
    assert [value(made, text) for text in (ENGLISH, GERMAN, JAPANESE)] == [1.0, 0.0, 1.0]
    graded = reward("language", languages=["en"], graded=True, among=["en", "de"])
    assert value(graded, ENGLISH) > 0.9
    assert value(graded, GERMAN) < 0.1
    both = reward("language", languages=["en", "de"], graded=True, among=["en", "de"])
    assert value(both, GERMAN) == pytest.approx(1.0)


def test_a_text_of_few_letters_has_no_language() -> None:
    for short in (1.0, 0.25):
        made = reward("language", languages=["en"], short=short)
        assert [value(made, text) for text in ("", "42 + 1 = 43 " * 20, "rot", "\ud800" * 3)] == [short] * 4
    sharp = reward("language", languages=["de"], among=["de", "en"], min_letter_bytes=5)
    assert value(sharp, "Ein rotes Quadrat") == 1.0


@pytest.mark.parametrize(
    ("options", "param", "told"),
    [
        ({"languages": ["english"]}, "languages", "'english' is unknown"),
        ({"languages": ["en"], "among": ["de", "fr"]}, "among", "'en' is wanted"),
    ],
)
def test_a_language_that_cannot_be_told_is_refused(options: Json, param: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as refused:
        reward("language", **options)
    assert refused.value.param == param


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(SettingsError, match=r"pip install 'noria\[model\]'"):
        reward("language", languages=["en"])


def test_these_need_no_torch() -> None:
    told = (
        "import sys; from noria.rewards import parse_rewards; from train.rewards import build; "
        "[build(one) for one in parse_rewards([{'name': 'exact'}, {'name': 'regex', 'pattern': 'a'}, "
        "{'name': 'repetition'}, {'name': 'length', 'high': 3}])]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_json_schema(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    texts = ('{"n": 1}', '{"n": "1"}', " [] ", "{n: 1}", '{"n": NaN}', '```json\n{"n": 2}\n```', "[" * 100_000)
    cases: list[tuple[Json, list[float]]] = [
        ({"definition": SCHEMA}, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ({"file": str(tmp_path / "schema.json"), "parsed": 0.25}, [1.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]),
        ({"definition": SCHEMA, "fenced": True}, [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
    ]
    for options, wanted in cases:
        made = reward("json_schema", **options)
        assert made([Sample([], text) for text in texts]) == wanted
        made.close()  # type: ignore[attr-defined]


def test_a_schema_s_pattern_that_never_ends_costs_its_sample() -> None:
    made = reward("json_schema", definition={"type": "string", "pattern": "^(a|aa)+$"}, timeout_s=2.0)
    texts = ['"aa"', json.dumps(CATASTROPHE), '"aaa"']
    assert made([Sample([], text) for text in texts]) == [1.0, Failure("timeout"), 1.0]
    made.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"definition": {"type": "objekt"}}, "not a JSON Schema at type"),
        ({"file": "nowhere.json"}, "cannot be read"),
    ],
)
def test_what_is_no_schema_is_refused(options: Json, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        reward("json_schema", **options)


def test_a_schema_is_never_fetched() -> None:
    made = reward("json_schema", definition={"$ref": "http://127.0.0.1:9/schema.json"})
    assert value(made, "1") == Failure("raised _WrappedReferencingError")
    made.close()  # type: ignore[attr-defined]
