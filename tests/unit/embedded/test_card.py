"""The model card: every figure comes from the record or from a measurement, and none outlives the weights it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from noria.errors import IntegrityError, InvalidRequest, NotFound
from noria.scenes import SETS
from tests.unit.embedded.material import evaluation, printed, told
from train.models.cli import main
from train.models.embedded.eyes.card import NOT_YET, SOURCES, write_card
from train.models.embedded.eyes.export import write_eyes
from train.models.embedded.eyes.extract import extract
from train.models.embedded.eyes.record import CARD, SCORES, Eyes, recipe_hash
from train.models.embedded.eyes.scores import read_scores


def card(eyes: Eyes) -> str:
    """The card as it stands."""
    return (eyes.folder / CARD).read_text()


def test_without_a_measurement_there_is_no_score(eyes: Eyes) -> None:
    text = card(eyes)
    assert text.count(NOT_YET) == 2
    assert "%" not in text
    assert f"sha256 `{eyes.record.sha256}`" in text
    assert f"{eyes.record.parameters:,} numbers in bfloat16" in text
    assert "(rank 4, alpha 12, 14 linears)" in text
    assert "`scenes`: scenes that `noria.scenes` draws" in text
    assert "12 in `vision`, 80 in `sft`." in text
    assert "CC BY 4.0" in text
    assert f"({eyes.record.recipe_sha256}) on 2 cores: 184 seconds of training (0.05 hours)" in text
    assert "| sft | 1,234 | 12 | 2 | 62 | 3.250 to 0.500 |" in text
    assert "`noria model build-embedded` makes them again" in text


def test_measured_scores_are_shown_by_kind_with_intervals_and_beside_the_plain_model(
    eyes: Eyes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = evaluation("embedded", {"colour": (190, 200), "left/right": (170, 200)})
    said, plain = evaluation("embedded-text", {"places": (9, 10)}), evaluation("embedded-text", {"places": (10, 10)})
    perplexity = tmp_path / "read.json"
    perplexity.write_text(json.dumps({"text": "forty answers", "tokens": 1234, "plain": 8.0, "eyes": 8.2}))
    words = ["card", str(eyes.folder), "--scores", str(printed(tmp_path / "seen.json", seen, said))]
    words += ["--plain", str(printed(tmp_path / "plain.json", plain)), "--perplexity", str(perplexity)]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("MODEL_CARD.md written; measured: embedded, embedded-text\n")
    text = card(eyes)
    assert NOT_YET not in text
    assert "| colour | 95.0 % | 91.0 to 97.3 | 200 |" in text
    assert "| left/right | 85.0 % | 79.4 to 89.3 | 200 |" in text
    assert "| all | 90.0 % | 86.7 to 92.6 | 400 |" in text
    assert "| `embedded-text` | right | 95 % | questions | plain SmolLM2 | 95 % |" in text
    assert "| places | 90.0 % | 59.6 to 98.2 | 10 | 100.0 % | 72.2 to 100.0 |" in text
    assert "Perplexity of forty answers (1,234 tokens): 8.20, plain SmolLM2 8.00 (+2.5 %)." in text


def test_a_later_measurement_replaces_its_own_set_alone(eyes: Eyes, tmp_path: Path) -> None:
    first = printed(tmp_path / "a.json", evaluation("embedded", {"colour": (1, 2)}), evaluation("more", {"x": (1, 1)}))
    write_card(eyes.folder, [first], [], None)
    write_card(eyes.folder, [printed(tmp_path / "b.json", evaluation("embedded", {"colour": (2, 2)}))], [], None)
    kept = read_scores(eyes.folder, eyes.record)
    assert kept is not None
    assert {name: one["scores"]["score"] for name, one in kept.measured.items()} == {"embedded": 1.0, "more": 1.0}
    before = card(eyes)
    write_card(eyes.folder, [], [], None)
    assert card(eyes) == before


def test_scores_of_other_weights_go(blank: Path, adapter: Path, eyes: Eyes, tmp_path: Path) -> None:
    write_card(eyes.folder, [printed(tmp_path / "a.json", evaluation("embedded", {"colour": (1, 2)}))], [], None)
    same = write_eyes(extract(blank, [adapter]), told(machine="4 cores"), eyes.folder)
    assert "| colour | 50.0 %" in card(same)
    assert "on 4 cores" in card(same)
    other = write_eyes(extract(blank, [adapter / "01-vision"]), told(), eyes.folder)
    assert other.record.sha256 != eyes.record.sha256
    assert not (eyes.folder / SCORES).exists()
    assert card(other).count(NOT_YET) == 2
    assert "the language model is as it was" in card(other)


@pytest.mark.parametrize(
    ("content", "error", "why"),
    [
        (None, NotFound, "cannot be read"),
        ("[", InvalidRequest, "is not JSON"),
        ("[]", InvalidRequest, "holds no scores; `noria eval"),
        ('{"data": [{}]}', InvalidRequest, "holds no scores; `noria eval"),
    ],
)
def test_files_without_figures_are_refused(
    eyes: Eyes, tmp_path: Path, content: str | None, error: Any, why: str
) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=why):
        write_card(eyes.folder, [file], [], None)
    with pytest.raises(IntegrityError, match=r"eyes\.json is missing"):
        write_card(tmp_path, [], [], None)


def test_a_recipe_s_hash_does_not_know_its_model(eyes: Eyes) -> None:
    recipe = eyes.recipe
    assert recipe.model is None
    assert recipe_hash(recipe.model_copy(update={"model": "embedded-blank"})) == eyes.record.recipe_sha256
    assert recipe_hash(recipe.model_copy(update={"name": "other"})) != eyes.record.recipe_sha256


def test_every_set_of_noria_has_its_line() -> None:
    """A set that the card cannot tell of would be called none of Noria's own."""
    assert set(SOURCES) == set(SETS)
