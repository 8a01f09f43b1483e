"""`python -m train rewards [FILE]`: scores samples from a file or standard input.

Comes in: one JSON object a line (`train.rewards.rows`). Goes out: one a line, in order, on standard output:
`{"total": 0.5, "parts": {"exact": 1.0, "judge": null}, "failed": {"judge": "timeout"}}`, with the row's `id` and
`index` where it has them; at the end the counts on standard error. Must not import torch at the top.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any

from noria.errors import InvalidRequest, NotFound, SettingsError
from noria.records import Json
from noria.rewards import NAMES, AnyReward, RewardSettings, parse_rewards
from noria.settings import Settings
from train.rewards.lent import lent
from train.rewards.registry import scorer_of
from train.rewards.rows import sample_of
from train.rewards.scorer import CHUNK, Scorer

_CARRIED = ("id", "index")


def main(settings: Settings, argv: Sequence[str]) -> int:
    """Scores every row. Raises NoriaError: an unknown reward, a row that is none, rewards that fail too often."""
    asked = _arguments(argv)
    chosen = _chosen(settings.train.reward, asked.reward)
    with _told_apart() as out, lent(settings, asked.model) as backing, scorer_of(chosen, backing) as scorer:
        opened = nullcontext(sys.stdin) if asked.file is None else _open(asked.file)
        with opened as lines:
            for row, score in _scored(scorer, lines, str(asked.file or "standard input")):
                carried = {key: row[key] for key in _CARRIED if key in row}
                out.write(json.dumps({**carried, **score}, ensure_ascii=False) + "\n")
                out.flush()
        sys.stderr.write(json.dumps({"rewards": scorer.counts}) + "\n")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train rewards", description="Scores samples.")
    parser.add_argument("file", nargs="?", type=Path, help="JSON lines; standard input if not given")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME|JSON",
        help=f"one of the settings' rewards by its name or label, another of {', '.join(NAMES)}, or its options as a "
        "JSON object; may be repeated. Default: every reward of the settings (train.reward.rewards)",
    )
    parser.add_argument("--model", default="live", help="a version, for rewards that look through a model")
    return parser.parse_args(list(argv))


def _chosen(settings: RewardSettings, named: Sequence[str]) -> RewardSettings:
    """The rewards that were asked for, in that order. Raises SettingsError, naming what is known."""
    if not named:
        if not settings.rewards:
            raise SettingsError("no reward: name one with --reward, or state train.reward.rewards", param="reward")
        return settings
    known = {one.key: one for one in settings.rewards}
    found: list[AnyReward] = []
    for word in named:
        if word in known:
            found.append(known[word])
        else:
            found += parse_rewards([_tree(word)], under=f"--reward {word}")
    parse_rewards([one.model_dump() for one in found], under="--reward")  # two under one name
    return settings.model_copy(update={"rewards": tuple(found)})


def _tree(word: str) -> Any:
    if not word.lstrip().startswith("{"):
        return {"name": word}
    try:
        return json.loads(word)
    except ValueError as error:
        raise SettingsError(f"--reward {word}: not JSON: {error}", param="reward") from error


def _scored(scorer: Scorer, lines: Iterable[str], name: str) -> Iterator[tuple[Json, Json]]:
    """Each row with its scores, some at a time: whoever reads along need not wait for the end."""
    rows = _rows(lines, name)
    while batch := list(islice(rows, CHUNK)):
        scores = scorer([sample_of(row, where) for row, where in batch])
        for at, (row, _) in enumerate(batch):
            parts = {key: values[at] for key, values in scores.parts.items()}
            yield row, {"total": scores.totals[at], "parts": parts, "failed": scores.failed[at]}


def _rows(lines: Iterable[str], name: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield json.loads(line), where
            except ValueError as error:
                raise InvalidRequest(f"{where}: not JSON: {error}", param="row") from error


def _open(file: Path) -> IO[str]:
    try:
        return file.open(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}", param="file") from error


@contextmanager
def _told_apart() -> Iterator[IO[str]]:
    """Standard output for the result alone: what libraries print goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
