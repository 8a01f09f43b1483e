"""Small training data on disk, stages over them, what a stage leaves: coloured squares, conversations, pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from noria.errors import LeaseLost
from noria.methods.table import LABELLED_KINDS, PREFERENCE_KINDS
from noria.recipes import RecipeStage, parse_recipe
from noria.records import Json

if TYPE_CHECKING:
    import torch

COLOURS = ("red", "green", "blue")
PAIRS: dict[str, str] = dict.fromkeys(PREFERENCE_KINDS, "preferences.jsonl")
LABELLED: dict[str, str] = dict.fromkeys(LABELLED_KINDS, "labels.jsonl")
FILES = {**PAIRS, **LABELLED, "kto": "verdicts.jsonl"}


def write_data(folder: Path, count: int = 12) -> Path:
    """`labels`, `conversations` (every third row without a picture), `preferences` and `verdicts`, as `.jsonl`."""
    rows: dict[str, list[Json]] = {"labels": [], "conversations": [], "preferences": [], "verdicts": []}
    for number in range(count):
        colour = COLOURS[number % 3]
        picture, box = _square(colour, number)
        picture.save(folder / f"{number}.png")
        shown = {"type": "image_url", "image_url": {"url": f"{number}.png"}}
        content: Any = [shown, {"type": "text", "text": "what is it"}] if number % 3 else f"say {colour}"
        asked = {"role": "user", "content": content}
        answer = {"role": "assistant", "content": "a " + "big " * (number % 4) + f"{colour} square"}
        objects = [{"label": colour, "box": box}]
        rows["labels"].append({"image": f"{number}.png", "labels": {"colour": colour}, "objects": objects})
        rows["conversations"].append({"messages": [asked, answer]})
        rows["preferences"].append({"messages": [asked, answer], "rejected_response": "no"})
        rows["verdicts"].append({"messages": [asked, answer], "label": number % 4 > 0})
    for name, found in rows.items():
        write_rows(folder / f"{name}.jsonl", found)
    return folder


def write_rows(path: Path, rows: Sequence[Json]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(data: Path, kind: str, **more: Any) -> RecipeStage:
    """A stage of four steps over `data`; `more` wins."""
    told = {
        "name": "one",
        "kind": kind,
        "data": [{"source": str(data / FILES.get(kind, "conversations.jsonl"))}],
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 256,
        "warmup_ratio": 0.0,
    }
    if "epochs" in more:
        told.pop("steps")
    return parse_recipe({"name": "test", "stages": [{**told, **more}]}).stages[0]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's delta."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "delta").glob("*.safetensors")):
        found |= load_file(path)
    return found


def stopper(code: str, calls: int) -> Callable[[], None]:
    """A check that says stop at its so-manieth call."""
    asked = iter(range(1, 10_000))

    def check() -> None:
        if next(asked) >= calls:
            raise LeaseLost("stop", code=code)

    return check


def _square(colour: str, number: int) -> tuple[Image.Image, list[float]]:
    width, height = 40, 24 + 4 * (number % 3)
    left, side = 10 + 2 * (number % 5), 10
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).rectangle((left, 4, left + side, 4 + side), fill=colour)
    return picture, [left / width, 4 / height, (left + side) / width, (4 + side) / height]
