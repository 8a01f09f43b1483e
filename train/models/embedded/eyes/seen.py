"""What a sighted master is quantised on: conversations that its eyes were trained on.

Comes in: the recipe of the eyes. Goes out: the very rows that the recipe's own job calibrates and verifies on, so that
a home which is given the eyes serves what the job would have served. Their pictures are drawn anew.
"""

from __future__ import annotations

from typing import Never

from noria.errors import NotFound
from noria.methods.table import LABELLED_KINDS
from noria.recipes import Recipe
from noria.settings import TrainSettings
from train.data import calibration
from train.data.sources import ImageLoader, read_all
from train.models.add import Conversations
from train.stages.job import RECIPE, spread_rows


def seen_conversations(recipe: Recipe, train: TrainSettings) -> Conversations | None:
    """Rows of the recipe's last stage with answers; none where it has no such stage."""
    answered = [stage for stage in recipe.stages if stage.kind not in LABELLED_KINDS]
    if not answered:
        return None
    last, counts = answered[-1], (train.quantize.calibration_samples, train.verify.samples)
    rows = spread_rows(read_all(last.data, last.kind, seed=last.seed), counts)
    load_image = ImageLoader(named=True)
    found = [sample for _, sample in calibration.samples(rows, {}, _no_completion, load_image, load_image)]
    return Conversations(RECIPE, found[: counts[0]], found[counts[0] :] or found[: counts[1]])


def _no_completion(id_: str) -> Never:
    raise NotFound(f"no completion {id_!r} here: rows of data stand for themselves", param="completion")
