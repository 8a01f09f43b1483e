"""What was measured of some eyes, kept beside them.

Comes in: what `noria eval --json` printed, of them and of the plain model; a perplexity. Goes out: `scores.json`.
It names the weights by their hash: figures of other weights are never shown as theirs. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from noria.errors import InvalidRequest, NotFound
from noria.records import Json
from train.models.embedded.eyes.record import SCORES, EyesRecord


class Perplexity(BaseModel):
    """Of one text, by the model with eyes and by the plain one; how it was measured stands in `text`."""

    model_config = ConfigDict(frozen=True)

    text: str
    """What was read."""
    tokens: int
    plain: float
    eyes: float


class Scores(BaseModel):
    """Evaluations by name of set. `plain` are those of the model before it saw."""

    model_config = ConfigDict(frozen=True)

    eyes: str
    """SHA-256 of the weights, in hex."""
    measured: dict[str, Json] = {}
    plain: dict[str, Json] = {}
    perplexity: Perplexity | None = None


def read_scores(folder: Path, record: EyesRecord) -> Scores | None:
    """What is kept of these weights; none where nothing is, or only of others."""
    try:
        kept = Scores.model_validate_json((folder / SCORES).read_text())
    except (FileNotFoundError, ValidationError):
        return None
    return kept if kept.eyes == record.sha256 else None


def gathered(
    record: EyesRecord, measured: Iterable[Path], plain: Iterable[Path], perplexity: Path | None, kept: Scores | None
) -> Scores:
    """The figures of all files over those that are kept. Raises NotFound and InvalidRequest naming the file."""
    before = kept or Scores(eyes=record.sha256)
    return Scores(
        eyes=record.sha256,
        measured={**before.measured, **_sets(measured)},
        plain={**before.plain, **_sets(plain)},
        perplexity=before.perplexity if perplexity is None else _perplexity(perplexity),
    )


def _sets(files: Iterable[Path]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for file in files:
        told = _read(file)
        rows: Sequence[Json] = told.get("data", []) if isinstance(told, dict) else []
        if not rows or not all({"set_name", "scores"} <= row.keys() for row in rows):
            raise InvalidRequest(f"{file} holds no scores; `noria eval VERSION --set embedded --json` prints some")
        found |= {row["set_name"]: {key: value for key, value in row.items() if key != "bad_rows"} for row in rows}
    return found


def _perplexity(file: Path) -> Perplexity:
    try:
        return Perplexity.model_validate(_read(file))
    except ValidationError as error:
        raise InvalidRequest(f'{file} is no {{"text", "tokens", "plain", "eyes"}}: {error}') from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}", param="scores") from error
    except ValueError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}", param="scores") from error
