"""Calibration's conversations: pairs and completions as the model said them, those cut by a limit included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from noria.errors import NotFound
from noria.records import Completion, Pair
from tests.unit.store.samples import completion
from train.data.calibration import samples
from train.export.rendering import render
from train.methods.policy_model import load_processor

PAIR = Pair("pref_1", "p1", ({"role": "user", "content": "say red"},), "red it", "no", 1.0)
WHOLE = completion("c1", ("it is",))
CUT = replace(WHOLE, id="c2", choices=(replace(WHOLE.choices[0], finish_reason="length"),))
STORED = {one.id: one for one in (WHOLE, CUT)}


def get(id_: str) -> Completion:
    if id_ not in STORED:
        raise NotFound(id_)
    return STORED[id_]


def no_image(sha256: str) -> Image.Image:
    raise AssertionError(sha256)


@pytest.mark.parametrize(
    ("pair", "reference", "ended"),
    [
        (PAIR, {"preference": "pref_1"}, True),
        (replace(PAIR, chosen_cut=True), {"preference": "pref_1"}, False),
        (replace(PAIR, rejected_cut=True), {"preference": "pref_1"}, True),
        (PAIR, {"completion": "c1"}, True),
        (PAIR, {"completion": "c2"}, False),
    ],
)
def test_a_cut_answer_is_not_ended(tiny_vlm: Path, pair: Pair, reference: dict[str, str], ended: bool) -> None:
    ((found, sample),) = samples([reference], {"pref_1": pair}, get, no_image, no_image)
    text = render(load_processor(tiny_vlm), sample.messages, cut=sample.cut)
    answer = "red it" if "preference" in reference else "it is"
    assert found == reference
    assert text.endswith(answer + ("<|im_end|>" if ended else ""))


def test_what_was_deleted_since_is_left_out() -> None:
    gone = [{"preference": "pref_9"}, {"completion": "c9"}]
    assert samples(gone, {"pref_1": PAIR}, get, no_image, no_image) == []
