"""Judgements as a preference trainer eats them: a rendered prompt, answers (ended only where the model did), pictures.

Comes in: records' `Pair`s and `Thumb`s and a way to read pictures. Goes out: `TextPair`s and `TextThumb`s and their
length in tokens. Must not import `serve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from noria.records import Pair, Thumb
from train.data.render import ChatRenderer
from train.data.samples import LoadImage
from train.data.snapshot import Judged


@dataclass(frozen=True)
class TextPair:
    """One pair as text. `prompt` ends where the answers begin; `images` are references in the prompt's order."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    images: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """What follows the prompt, in turn."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class TextThumb:
    """One answer with its thumb, as text; `prompt` and `images` as of a pair."""

    id: str
    prompt: str
    answer: str
    up: bool
    images: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """What follows the prompt."""
        return (self.answer,)


Text = TypeVar("Text", TextPair, TextThumb)


class Renderer(ABC, Generic[Judged, Text]):
    """Renders judgements with one checkpoint's processor, and measures.

    One prompt is measured once: pictures make measuring slow, and a prompt has many judgements.
    """

    def __init__(self, chat: ChatRenderer, load_image: LoadImage) -> None:
        self.chat = chat
        self._load_image = load_image
        self._prompt_tokens: dict[str, int] = {}

    @abstractmethod
    def render(self, judged: Judged) -> Text:
        """The judgement as text."""

    def is_readable(self, judged: Judged) -> bool:
        """Whether each picture has its placeholder in the prompt, and there is no other anywhere.

        Somebody may have written one as text. The processor would look for its picture.
        """
        text, token = self.render(judged), self.chat.image_token
        return text.prompt.count(token) == len(text.images) and not any(token in answer for answer in text.answers)

    def tokens(self, judged: Judged) -> int:
        """Prompt, pictures included, plus the longest answer, in tokens. Raises TrainingError for a bad picture."""
        text = self.render(judged)
        if judged.prompt_hash not in self._prompt_tokens:
            self._prompt_tokens[judged.prompt_hash] = self._count_prompt(text.prompt, text.images)
        return self._prompt_tokens[judged.prompt_hash] + max(map(self._count, text.answers))

    def _count(self, text: str) -> int:
        return len(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _count_prompt(self, prompt: str, images: Sequence[str]) -> int:
        if not images:
            return self._count(prompt)
        pictures = [self._load_image(one) for one in images]
        encoded = self.chat.processor(images=[pictures], text=[prompt], add_special_tokens=False)
        return len(encoded["input_ids"][0])


class PairRenderer(Renderer[Pair, TextPair]):
    """Renders pairs and measures them."""

    def render(self, judged: Pair) -> TextPair:
        """The pair as text."""
        return TextPair(
            id=judged.preference_id,
            prompt=self.chat.prompt(judged.messages),
            chosen=self.chat.answer(judged.messages, judged.chosen, cut=judged.chosen_cut),
            rejected=self.chat.answer(judged.messages, judged.rejected, cut=judged.rejected_cut),
            images=tuple(judged.images),
        )


class ThumbRenderer(Renderer[Thumb, TextThumb]):
    """Renders answers with a thumb and measures them."""

    def render(self, judged: Thumb) -> TextThumb:
        """The answer as text."""
        return TextThumb(
            id=judged.feedback_id,
            prompt=self.chat.prompt(judged.messages),
            answer=self.chat.answer(judged.messages, judged.answer, cut=judged.cut),
            up=judged.up,
            images=tuple(judged.images),
        )
