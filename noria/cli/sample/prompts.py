"""The prompts that `noria sample` asks.

Comes in: words of the operator's, a set's name, or a file. Goes out: conversations with what is known of them.
A line of a `.jsonl` file has `messages`, or `prompt` (or `question`) with `image` or `images`; `answers` (or `answer`)
where the right ones are known; `options` are shown behind the words. Every key but the prompt's own goes to the rewards
as it is. Other formats, and sets by name, are read as `noria eval` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json

READ = ("messages", "prompt", "question", "image", "images")


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its answer; `known` are the other keys of its row."""

    messages: list[Json]
    known: Json = field(default_factory=dict)


def prompts_of(words: str | None, pictures: Sequence[Path], named: str | None, limit: int | None) -> list[Prompt]:
    """The prompts that the options name. Raises InvalidRequest, NotFound."""
    if (words is None) == (named is None):
        raise InvalidRequest("say what to ask: --prompt TEXT, or --prompts with a set or a file", param="prompts")
    if words is not None:
        return [Prompt([_user(words, [str(path.resolve()) for path in pictures], Path.cwd())])]
    if pictures:
        raise InvalidRequest("--image belongs to --prompt; a file's rows name their own", param="image")
    path = Path(str(named)).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return list(_rows(path))[:limit]
    return _questions(str(named), limit)


def _rows(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"{where}: not JSON: {error}", param="prompts") from error
            if not isinstance(row, dict):
                raise InvalidRequest(f"{where}: not a JSON object", param="prompts")
            yield Prompt(_messages(row, path.parent, where), {k: v for k, v in row.items() if k not in READ})


def _messages(row: Json, folder: Path, where: str) -> list[Json]:
    asked = row.get("messages") or row.get("prompt") or row.get("question")
    if isinstance(asked, list):
        return list(asked)
    if not isinstance(asked, str):
        raise InvalidRequest(f"{where}: one of 'messages', 'prompt' and 'question' is needed", param="prompts")
    if row.get("options"):
        from noria.evals.readers.jsonl import with_options

        asked = with_options(asked, [str(option) for option in row["options"]])
    pictures: Any = row.get("images") or ([row["image"]] if row.get("image") else [])
    return [_user(asked, pictures, folder)]


def _user(words: str, pictures: Sequence[str], folder: Path) -> Json:
    if not pictures:
        return {"role": "user", "content": words}
    from noria.evals.questions import data_url
    from noria.evals.readers.pictures import picture_at

    parts: list[Json] = []
    for ref in pictures:
        try:
            url = data_url(picture_at(ref, folder).read())
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{ref}: {error}", param="image") from error
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def _questions(named: str, limit: int | None) -> list[Prompt]:
    from noria.cli.eval.report import tell_bad_rows
    from noria.evals.questions import content_of
    from noria.evals.sets import load_set

    loaded = load_set(named, limit=limit)
    tell_bad_rows(loaded)
    return [
        Prompt(
            [{"role": "user", "content": content_of(one)}],
            {
                "answers": list(one.answers),
                "metric": one.metric,
                "tolerance": one.tolerance,
                **({"options": list(one.options)} if one.options else {}),
            },
        )
        for one in loaded.questions
    ]
