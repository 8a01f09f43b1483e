"""The head: weights over standardised features, with its figures, as a folder that is complete or absent.

Comes in: features. Goes out: scores; `head.safetensors` and `head.json` (figures, and the hash of the former).
Must not import `serve`.

Shapes: N answers, D features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from noria.errors import IntegrityError, NotFound, TrainingError
from noria.records import Json
from train.pipeline.files import read_json, write_json

TENSORS, FIGURES = "head.safetensors", "head.json"
_SAME = 0.1  # largest relative distance of one model's probe on two machines or in two precisions


@dataclass(frozen=True)
class Head:
    """score(f) = (w . (f - mean) / scale - middle) / spread: mean 0 and deviation 1 over the answers it learnt from.

    One unit is `spread` nats: annotators choose a over b with probability sigmoid(spread (score(a) - score(b))).
    `probe_D` are the features of one fixed conversation, by which the model is known again. `figures` are what
    `head.json` says: what it learnt from, its penalty, its accuracy on held-out pairs.
    """

    weight_D: torch.Tensor
    mean_D: torch.Tensor
    scale_D: torch.Tensor
    middle: float
    spread: float
    probe_D: torch.Tensor
    figures: Json = field(default_factory=dict)

    def scores(self, features_ND: torch.Tensor) -> torch.Tensor:
        """(N,)."""
        nats_N: torch.Tensor = (features_ND - self.mean_D) / self.scale_D @ self.weight_D
        return (nats_N - self.middle) / self.spread

    def require_model(self, probe_D: torch.Tensor) -> None:
        """Raises TrainingError unless the model is the one whose features the head was learnt on."""
        if probe_D.shape == self.probe_D.shape:
            distance = float((probe_D - self.probe_D).norm() / self.probe_D.norm())
            if distance <= _SAME:
                return
            told = f"the features of its probe differ by {distance:.2f} of their length"
        else:
            told = f"it has {len(self.probe_D)} features, the model {len(probe_D)}"
        raise TrainingError(f"the preference head was learnt on another model: {told}; learn it again", code="no_head")


def save_head(head: Head, folder: Path) -> Head:
    """Writes the folder beside and renames it into place; the head with its hash among its figures."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    named = {name: getattr(head, name) for name in ("weight_D", "mean_D", "scale_D", "probe_D")}
    named["level"] = torch.tensor([head.middle, head.spread], dtype=torch.float64)
    save_file({name.removesuffix("_D"): value.contiguous() for name, value in named.items()}, beside / TENSORS)
    figures = {**head.figures, "sha256": _sha256(beside / TENSORS)}
    write_json(beside / FIGURES, figures)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return replace(head, figures=figures)


def load_head(folder: Path) -> Head:
    """The head in a folder. Raises NotFound, or IntegrityError when its bytes are not those that were saved."""
    try:
        figures = read_json(folder / FIGURES)
    except json.JSONDecodeError as error:
        raise IntegrityError(f"{folder / FIGURES} is not JSON: {error}") from error
    if figures is None or not (folder / TENSORS).is_file():
        raise NotFound(f"no preference head in {folder}", param="head")
    if _sha256(folder / TENSORS) != figures.get("sha256"):
        raise IntegrityError(f"{folder / TENSORS} is not what {FIGURES} beside it says")
    held = load_file(folder / TENSORS)
    middle, spread = held["level"].tolist()
    return Head(held["weight"], held["mean"], held["scale"], middle, spread, held["probe"], figures)


def _sha256(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
