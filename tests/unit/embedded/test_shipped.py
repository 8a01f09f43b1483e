"""The eyes that travel with Noria: whole, small, by the shipped recipe, described by what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution

from noria.evals.named.embedded import embedded_questions
from noria.recipes import load_recipe
from train.models.embedded import BLANK
from train.models.embedded.download import GGUF_NAME, GGUF_SHA256
from train.models.embedded.eyes.card import render_card
from train.models.embedded.eyes.record import CARD, FILES, MOST_BYTES, SHIPPED, open_eyes, recipe_hash
from train.models.embedded.eyes.scores import read_scores

ROOT = Path(__file__).parents[3]


def test_they_are_whole_small_and_for_the_language_model_that_is_fetched() -> None:
    eyes = open_eyes(SHIPPED)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= MOST_BYTES
    assert {file.name for file in SHIPPED.iterdir()} <= set(FILES)
    assert (eyes.record.language_model, eyes.record.language_model_sha256) == (GGUF_NAME, GGUF_SHA256)
    assert eyes.record.lora is not None
    assert eyes.record.lora.linears == 30 * 7  # SmolLM2-135M's decoder
    assert sum(stage.seconds for stage in eyes.record.stages) < 2 * 3600


def test_they_are_by_the_shipped_recipe() -> None:
    recipe = load_recipe(ROOT / "deploy/settings/recipes/embedded.toml")
    assert recipe.model == BLANK
    assert recipe_hash(recipe) == open_eyes(SHIPPED).record.recipe_sha256
    assert recipe_hash(open_eyes(SHIPPED).recipe) == recipe_hash(recipe)


def test_the_card_is_what_the_record_and_the_scores_say() -> None:
    record = open_eyes(SHIPPED).record
    assert (SHIPPED / CARD).read_text() == render_card(record, read_scores(SHIPPED, record))


def test_every_kind_of_question_was_measured_on_these_weights() -> None:
    scores = read_scores(SHIPPED, open_eyes(SHIPPED).record)
    assert scores is not None
    measured = scores.measured["embedded"]["scores"]
    assert set(measured["categories"]) == {question.category for question in embedded_questions()}
    assert measured["n"] == len(embedded_questions())
    assert {"embedded-text"} <= scores.measured.keys() & scores.plain.keys()
    assert scores.perplexity is not None


def test_an_installed_noria_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    build: Any = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # what git tracks does not count: a wheel may be built without it
    folder = "train/models/embedded/eyes"
    copied = {Path(name).name for name in build.find_data_files(folder.replace("/", "."), folder)}
    assert folder.replace("/", ".") in build.packages
    assert copied == {file.name for file in SHIPPED.iterdir()}
