"""Conversations out of foreign rows: roles, content and picture placeholders brought into OpenAI's shape.

Comes in: a row's turns and its pictures. Goes out: a `Conversation`, which becomes the sample that a stage asks for.
Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noria.errors import InvalidRequest
from noria.records import Json, image_references
from train.data.formats.pictures import Pictures
from train.data.samples import PreferenceSample, Sample, ThumbSample, image_part

TAG = "<image>"
_VERDICTS: dict[str, tuple[bool | str, bool | str]] = {
    "label": (True, False),
    "kto_tag": (True, False),
    "thumb": ("up", "down"),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """`prompt` ends where the answer begins; `rejected` is there when the row has a worse answer to it."""

    prompt: tuple[Json, ...]
    answer: str
    rejected: str | None = None
    answer_cut: bool = False
    rejected_cut: bool = False

    def sample(self, source: str) -> Sample:
        """As a supervised sample: what is learnt is the (better) answer."""
        answer = {"role": "assistant", "content": self.answer}
        return Sample((*self.prompt, answer), image_references(self.prompt), source, self.answer_cut)

    def preference(self, source: str) -> PreferenceSample:
        """As a pair. Raises InvalidRequest when the row has one answer only, or the same twice."""
        if self.rejected is None:
            raise InvalidRequest("the row has no rejected answer")
        if self.rejected.strip() == self.answer.strip():
            raise InvalidRequest("chosen and rejected are the same")
        return PreferenceSample(
            self.prompt,
            image_references(self.prompt),
            self.answer,
            self.rejected,
            source,
            self.answer_cut,
            self.rejected_cut,
        )

    def thumbs(self, source: str, row: Mapping[str, Any]) -> list[ThumbSample]:
        """As answers with a thumb: the better and the worse of two, or the one with what the row says of it.

        Raises InvalidRequest when there is one answer, and the row does not say what was thought of it.
        """
        images = image_references(self.prompt)
        if self.rejected is not None:
            pair = self.preference(source)
            return [
                ThumbSample(self.prompt, images, pair.chosen, True, source, pair.chosen_cut),
                ThumbSample(self.prompt, images, pair.rejected, False, source, pair.rejected_cut),
            ]
        up = _verdict_of(row)
        if up is None:
            raise InvalidRequest("the row has one answer and no verdict on it ('label', 'kto_tag' or 'thumb')")
        return [ThumbSample(self.prompt, images, self.answer, up, source, self.answer_cut)]


def conversation(
    turns: Sequence[Json], answer: str | None = None, rejected: str | None = None, *, needs_question: bool = True
) -> Conversation:
    """The conversation of normalised turns; without `answer` the last turn is it.

    Raises InvalidRequest: no answer at the end, a blank one, nobody asked, or an answer with a picture in it.
    """
    prompt = list(turns)
    if answer is None:
        if not prompt or prompt[-1]["role"] != "assistant":
            raise InvalidRequest("the last message is not the assistant's: there is no answer to learn")
        answer = plain_text(prompt.pop())
    elif prompt and prompt[-1]["role"] == "assistant":
        raise InvalidRequest("the prompt ends with an assistant's message, and an answer follows it")
    if not answer.strip() or (rejected is not None and not rejected.strip()):
        raise InvalidRequest("an answer is blank")
    for turn in prompt:
        if turn["role"] == "assistant":
            plain_text(turn)
    if needs_question and not any(turn["role"] == "user" for turn in prompt):
        raise InvalidRequest("no user's message comes before the answer")
    return Conversation(tuple(prompt), answer, rejected)


def read_turns(
    raw: Any, pictures: Pictures, *, keys: tuple[str, str] = ("role", "content"), tags: bool = False
) -> list[Json]:
    """Turns in OpenAI's shape; with `tags`, each `<image>` in a text shows the row's next picture.

    Pictures that no tag or part asked for are shown at the head of the first user's turn.
    """
    if not isinstance(raw, Iterable) or isinstance(raw, str | bytes | Mapping):
        raise InvalidRequest(f"the conversation is a {type(raw).__name__}, not a list of messages")
    turns = [_turn(turn, pictures, keys, tags) for turn in raw]
    left = pictures.rest()
    if left:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise InvalidRequest("the row has pictures but no user's message to show them in")
        first["content"] = [*map(image_part, left), *_as_parts(first["content"])]
    return turns


def tagged(text: str, pictures: Pictures) -> str | list[Json]:
    """A text whose `<image>` tags are replaced by parts; a line break beside a tag belongs to the tag."""
    pieces = re.split(re.escape(TAG), text)
    if len(pieces) == 1:
        return text
    parts: list[Json] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(image_part(pictures.take()))
        words = piece.removeprefix("\n") if number else piece
        words = words.removesuffix("\n") if number < len(pieces) - 1 else words
        if words:
            parts.append({"type": "text", "text": words})
    return parts


def plain_text(turn: Mapping[str, Any]) -> str:
    """What an assistant says. Raises InvalidRequest when that is a picture or a tool call and not text."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    if not content or any(part["type"] != "text" for part in content):
        raise InvalidRequest("an assistant's message has a picture, or no text")
    return "".join(part["text"] for part in content)


def _verdict_of(row: Mapping[str, Any]) -> bool | None:
    """What a row says of its one answer: TRL's and ms-swift's `label`, LLaMA-Factory's `kto_tag`, our `thumb`.

    None where it says nothing. Raises InvalidRequest for a word that is neither good nor bad.
    """
    for key, words in _VERDICTS.items():
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | str) or value not in words:
            raise InvalidRequest(f"{key!r} is {value!r}, not {' or '.join(map(repr, words))}")
        return value == words[0]
    return None


def _turn(turn: Any, pictures: Pictures, keys: tuple[str, str], tags: bool) -> Json:
    if not isinstance(turn, Mapping) or keys[0] not in turn:
        raise InvalidRequest(f"a message has no {keys[0]!r}")
    role = ROLES.get(str(turn[keys[0]]))
    if role is None:
        raise InvalidRequest(f"a message has role {turn[keys[0]]!r}; known are {', '.join(ROLES)}")
    more = {key: turn[key] for key in ("tool_calls", "tool_call_id", "name") if turn.get(key)}
    content = turn.get(keys[1])
    if isinstance(content, str):
        return {"role": role, "content": tagged(content, pictures) if tags else content, **more}
    if content is None:
        if role != "assistant" or not more.get("tool_calls"):
            raise InvalidRequest(f"a message of the {role} has no {keys[1]!r}")
        return {"role": role, "content": "", **more}
    if not isinstance(content, Iterable) or isinstance(content, Mapping | bytes):
        raise InvalidRequest(f"a message's {keys[1]!r} is a {type(content).__name__}")
    return {"role": role, "content": [_part(part, pictures) for part in content], **more}


def _part(part: Any, pictures: Pictures) -> Json:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "image", "input_image"):
        named = any(part.get(key) for key in ("image_url", "image", "url", "path", "bytes", "base64"))
        return image_part(pictures.place.reference(part) if named else pictures.take())
    raise InvalidRequest(f"a message has a {kind!r} part, which cannot be trained on")


def _as_parts(content: Any) -> list[Json]:
    if not isinstance(content, str):
        return list(content)
    return [{"type": "text", "text": content}] if content else []
