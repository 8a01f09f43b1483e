"""Prompts: captured conversations, rows of files, questions about made pictures; mixed by their weights, in a seeded
order that a restart finds again.

Comes in: `PromptSource`s, the store's conversations. Goes out: `Prompts`, of which a `Stream` deals. Must not import
torch or `serve`.

A row of a file has `messages` (up to the answer; a last message of the assistant's is the right answer), or `prompt`
(a text or messages) or `question`, with `image` or `images`; `answers` (a list, or one text; also `answer`) where they
are known. Every other column is handed to the rewards.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from noria.errors import InvalidRequest, TrainingError
from noria.evals.readers.jsonl import with_options
from noria.methods.grpo import CAPTURED, PromptSource
from noria.records import BadRow, Completion, Json, image_references
from noria.scenes import scene_questions
from noria.scenes.asked import DRAWN_KINDS
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import plain_text, read_turns
from train.data.render import is_readable
from train.data.samples import image_part
from train.data.sources import files, hub, made
from train.data.sources.files import RawRow
from train.methods.grpo.groups import Prompt

DEFAULT_COUNT = 2000
BAD_ROWS = 20  # told one by one in a report
_READ = ("messages", "prompt", "question", "answers", "answer", "image", "images")
Captured = Callable[[PromptSource], Iterable[Completion]]
"""The conversations that a source of captured prompts stands for."""


@dataclass(frozen=True)
class SourcePrompts:
    """What one source gave, in its order, and the rows that were left out."""

    source: PromptSource
    prompts: tuple[Prompt, ...]
    bad: tuple[BadRow, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Over everything that is asked and known of it; bytes of pictures that are only named are not in it."""
        rows = [[one.source, one.messages, one.answers, one.extra] for one in self.prompts]
        text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=repr)
        return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"

    def report(self) -> Json:
        """For a job's record."""
        bad = [str(row) for row in self.bad[:BAD_ROWS]]
        told = {"source": self.source.source, "weight": self.source.weight, "prompts": len(self.prompts)}
        return {**told, "bad_rows": len(self.bad), "bad": bad, "sha256": self.sha256}


def read_prompts(sources: Sequence[PromptSource], captured: Captured) -> tuple[SourcePrompts, ...]:
    """Reads every source. Raises TrainingError (code `no_data`) for one that has no prompt, NotFound, Unavailable."""
    found = tuple(_read(source, captured) for source in sources)
    for one in found:
        if not one.prompts:
            why = ", nothing that may train was captured" if one.source.source == CAPTURED else ""
            why = f": {one.bad[0]}" if one.bad else why
            raise TrainingError(f"prompts of {one.source.source!r}: there is none{why}", code="no_data")
    return found


class Stream:
    """Deals prompts without end. The n-th is the same for the same sources and seed, whoever asks when."""

    def __init__(self, sources: Sequence[SourcePrompts], seed: int) -> None:
        self._sources = sources
        self._seed = seed
        self._dealt = 0
        self._order = self._prompts()

    @property
    def dealt(self) -> int:
        """How many were dealt so far; with it a restart goes on (`skip`)."""
        return self._dealt

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ones, each with its number."""
        found = []
        for _ in range(count):
            found.append((self._dealt, next(self._order)))
            self._dealt += 1
        return found

    def skip(self, count: int) -> None:
        """As if so many had been dealt."""
        self.take(count)

    def _prompts(self) -> Iterator[Prompt]:
        chance = random.Random(f"{self._seed}:sources")  # noqa: S311 - an order, no secret
        passes = [self._passes(number, one.prompts) for number, one in enumerate(self._sources)]
        shares = [one.source.weight for one in self._sources]
        while True:
            yield next(chance.choices(passes, shares)[0])

    def _passes(self, number: int, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        chance = random.Random(f"{self._seed}:{number}")  # noqa: S311 - an order, no secret
        while True:
            yield from chance.sample(prompts, len(prompts))


def _read(source: PromptSource, captured: Captured) -> SourcePrompts:
    if source.source == CAPTURED:
        return _of_completions(source, captured(source))
    if source.source == "scenes":
        return SourcePrompts(source, tuple(_of_scenes(source)))
    raw = _rows(source)
    if source.count is not None and not made.is_made(source.source) and source.count < len(raw):
        raw = [raw[at] for at in sorted(random.Random(source.seed).sample(range(len(raw)), source.count))]  # noqa: S311
    prompts, bad = [], []
    for row in raw:
        try:
            prompts.append(_of_row(row))
        except InvalidRequest as error:
            bad.append(BadRow(row.file, row.line, error.message))
    return SourcePrompts(source, tuple(prompts), tuple(bad))


def _of_completions(source: PromptSource, completions: Iterable[Completion]) -> SourcePrompts:
    """What was asked; no answer to it is known to be right. What users named and nobody stored is never fetched."""
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    for one in completions:
        name = f"{CAPTURED}:{one.id}"
        if is_readable(one.messages):
            extra = {"prompt_hash": one.prompt_hash}
            prompts.append(Prompt(name, one.messages, image_references(one.messages), extra=extra))
        else:
            bad.append(BadRow(CAPTURED, len(prompts) + len(bad) + 1, f"{one.id} shows what was not stored"))
    return SourcePrompts(source, tuple(prompts), tuple(bad))


def _of_scenes(source: PromptSource) -> Iterator[Prompt]:
    unknown = sorted(set(source.kinds) - set(DRAWN_KINDS))
    kinds = [kind for kind in DRAWN_KINDS if kind in source.kinds or not source.kinds]
    if unknown:
        told = f"no kind of questions is called {unknown[0]!r}; there are {', '.join(DRAWN_KINDS)}"
        raise InvalidRequest(told, param="kinds")
    count = source.count or DEFAULT_COUNT
    each = -(-count // len(kinds))
    asked = scene_questions(source.split, source.seed, each, kinds)
    for number in range(count):  # kinds in turn
        one = asked[number % len(kinds) * each + number // len(kinds)]
        message = {"role": "user", "content": [image_part(one.image), {"type": "text", "text": one.question}]}
        yield Prompt(one.image, (message,), (one.image,), (one.answer,), {"kind": one.kind})


def _rows(source: PromptSource) -> Sequence[RawRow]:
    name = source.source
    if made.is_made(name):
        return made.rows(name, "grpo", source.split, source.count or DEFAULT_COUNT, source.seed)
    if files.is_url(name) or files.exists(name) or not hub.is_name(name):
        return files.read_rows(name)
    return hub.HubRows(name, source.split)


def _of_row(raw: RawRow) -> Prompt:
    if raw.problem is not None:
        raise InvalidRequest(raw.problem)
    if not isinstance(raw.value, dict):
        raise InvalidRequest(f"the row is {type(raw.value).__name__}, not an object")
    row = {key: value for key, value in raw.value.items() if value is not None}
    shown = row.get("images") or row.get("image")
    turns = read_turns(_asked(row), Pictures(Place(raw.file, raw.folder), shown), tags=shown is not None)
    answers = _answers(row)
    if turns and turns[-1]["role"] == "assistant":
        answers = answers or [plain_text(turns[-1])]
        turns.pop()
    if not any(turn["role"] == "user" for turn in turns):
        raise InvalidRequest("no user's message is in the prompt")
    extra = {key: value for key, value in row.items() if key not in _READ}
    return Prompt(f"{raw.file}:{raw.line}", tuple(turns), image_references(turns), tuple(answers), extra)


def _asked(row: Json) -> Any:
    if "messages" in row:
        return row["messages"]
    asked = row.get("prompt", row.get("question"))
    if isinstance(asked, str):
        if row.get("options"):
            asked = with_options(asked, [str(option) for option in row["options"]])
        return [{"role": "user", "content": asked}]
    if asked is None:
        raise InvalidRequest(
            f"the row has no messages, prompt or question; its keys: {', '.join(sorted(row)) or 'none'}"
        )
    return asked


def _answers(row: Json) -> list[str]:
    found = row.get("answers", row.get("answer"))
    if found is None:
        return []
    return [str(one) for one in found] if isinstance(found, (list, tuple)) else [str(found)]
