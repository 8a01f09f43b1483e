"""An eyes folder: one file of weights and a record that says what they are.

Comes in: a folder. Goes out: `Eyes`, checked to the byte. Must not import torch.

| file | |
|---|---|
| `eyes.safetensors` | tower and aligner whole, by the hub's names; the language model's LoRA by peft's; bfloat16 |
| `eyes.json` | the record: hash of that file, recipe, data, seconds, machine |
| `scores.json` | what was measured of it, when it has been; as `noria eval --json` prints it |
| `MODEL_CARD.md` | written from the two others |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from noria.errors import IntegrityError
from noria.recipes import Recipe, parse_recipe
from noria.records import Json

WEIGHTS, RECORD, SCORES, CARD = "eyes.safetensors", "eyes.json", "scores.json", "MODEL_CARD.md"
FILES = (WEIGHTS, RECORD, SCORES, CARD)
MOST_BYTES = 12_000_000
"""Of the whole folder."""
SHIPPED = Path(__file__).with_name("shipped")
_ADVICE = "install Noria again"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Part):
    """The language model's LoRA; it adds `scale` B A to a weight, `scale` being alpha / rank."""

    rank: int
    alpha: float
    scale: float
    linears: int
    """How many weights it changes."""


class TrainedStage(_Part):
    """One stage of the recipe, as it went."""

    name: str
    kind: str
    steps: int
    seconds: float
    """Time in training; waiting between two attempts is not in it."""
    samples: int
    data_sha256: str
    trainable_parameters: int
    loss_first: float
    loss_last: float
    """Mean over the last tenth of the steps."""


class EyesRecord(_Part):
    """What the weights are and where they come from."""

    format: Literal[1] = 1
    sha256: str
    """Of `eyes.safetensors`, in hex."""
    size: int
    """Its bytes."""
    tensors: int
    parameters: int
    """Numbers in it."""
    language_model: str
    """The file that the LoRA belongs to."""
    language_model_sha256: str
    lora: Lora | None
    recipe: Json
    """As it was run, but for the model that it starts from."""
    recipe_sha256: str
    stages: tuple[TrainedStage, ...]
    version: str
    """The version that it was made from, in its home."""
    job: str | None
    created_at: float
    """When that version was published."""
    machine: str
    versions: dict[str, str]
    """Of Python and of the packages that trained."""


@dataclass(frozen=True)
class Eyes:
    """A folder whose weights are those of its record."""

    folder: Path
    record: EyesRecord

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return self.folder / WEIGHTS

    @property
    def recipe(self) -> Recipe:
        """The recipe that made them; it names no model."""
        return parse_recipe(self.record.recipe, where=f"{self.folder / RECORD}: recipe")


def open_eyes(folder: Path) -> Eyes:
    """Reads the record and every byte of the weights.

    Raises IntegrityError, naming the file, when one is missing, cut short or not what the record says.
    """
    record = read_record(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise IntegrityError(f"the embedded model's eyes: {weights} is missing; {_ADVICE}", param=WEIGHTS)
    size, sha256 = weights.stat().st_size, sha256_of(weights)
    if (size, sha256) != (record.size, record.sha256):
        raise IntegrityError(
            f"the embedded model's eyes: {weights} has {size} bytes and sha256 {sha256}, its record says "
            f"{record.size} and {record.sha256}; {_ADVICE}",
            param=WEIGHTS,
        )
    return Eyes(folder, record)


def read_record(folder: Path) -> EyesRecord:
    """The record alone. Raises IntegrityError when it is missing or none."""
    path = folder / RECORD
    try:
        return EyesRecord.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise IntegrityError(f"the embedded model's eyes: {path} is missing; {_ADVICE}", param=RECORD) from None
    except (OSError, ValueError, ValidationError) as error:
        raise IntegrityError(f"the embedded model's eyes: {path} is no record: {error}", param=RECORD) from error


def recipe_json(recipe: Recipe) -> Json:
    """A recipe without the name of the model that it starts from, which is the home's affair."""
    told = recipe.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in told.items() if key != "model"}


def recipe_hash(recipe: Recipe) -> str:
    """`sha256:..` of what a recipe trains, whatever the model is called."""
    return f"sha256:{hashlib.sha256(json.dumps(recipe_json(recipe), sort_keys=True).encode()).hexdigest()}"


def sha256_of(file: Path) -> str:
    """A file's hash, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
