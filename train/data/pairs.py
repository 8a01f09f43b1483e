"""Judgements as a preference trainer eats them: a rendered prompt, answers (ended only where the model did), pictures.

Comes in: records' `Pair`s and `Thumb`s and a way to read pictures. Goes out: `TextPair`s and `TextThumb`s and their
length in tokens. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noria.records import Pair, Thumb
from train.data.render import ChatRenderer
from train.data.samples import LoadImage


@dataclass(frozen=True)
class TextPair:
    """One pair as text. `prompt` ends where the answers begin; `images` are references in the prompt's order."""

    preference_id: str
    prompt: str
    chosen: str
    rejected: str
    images: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The judgement's."""
        return self.preference_id


@dataclass(frozen=True)
class TextThumb:
    """One answer with its thumb, as text; `prompt` and `images` as of a pair."""

    feedback_id: str
    prompt: str
    answer: str
    up: bool
    images: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The judgement's."""
        return self.feedback_id


class _Renderer:
    """Renders with one checkpoint's processor, and measures.

    One prompt is measured once: pictures make measuring slow, and a prompt has many judgements.
    """

    def __init__(self, renderer: ChatRenderer, load_image: LoadImage) -> None:
        self._renderer = renderer
        self._load_image = load_image
        self._prompt_tokens: dict[str, int] = {}

    def _readable(self, prompt: str, images: Sequence[str], answers: Sequence[str]) -> bool:
        token = self._renderer.image_token
        return prompt.count(token) == len(images) and not any(token in answer for answer in answers)

    def _longest(self, prompt_hash: str, prompt: str, images: Sequence[str], answers: Sequence[str]) -> int:
        if prompt_hash not in self._prompt_tokens:
            self._prompt_tokens[prompt_hash] = self._count_prompt(prompt, images)
        tokenizer = self._renderer.tokenizer
        longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
        return self._prompt_tokens[prompt_hash] + longest

    def _count_prompt(self, prompt: str, images: Sequence[str]) -> int:
        if not images:
            return len(self._renderer.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        pictures = [self._load_image(one) for one in images]
        encoded = self._renderer.processor(images=[pictures], text=[prompt], add_special_tokens=False)
        return len(encoded["input_ids"][0])


class PairRenderer(_Renderer):
    """Renders pairs with one checkpoint's processor and measures them."""

    def render(self, pair: Pair) -> TextPair:
        """The pair as text."""
        return TextPair(
            preference_id=pair.preference_id,
            prompt=self._renderer.prompt(pair.messages),
            chosen=self._renderer.answer(pair.messages, pair.chosen, cut=pair.chosen_cut),
            rejected=self._renderer.answer(pair.messages, pair.rejected, cut=pair.rejected_cut),
            images=tuple(pair.images),
        )

    def is_readable(self, pair: Pair) -> bool:
        """Whether each picture has its placeholder in the prompt, and there is no other anywhere.

        Somebody may have written one as text. The processor would look for its picture.
        """
        rendered = self.render(pair)
        return self._readable(rendered.prompt, pair.images, (rendered.chosen, rendered.rejected))

    def tokens(self, pair: Pair) -> int:
        """Prompt, pictures included, plus the longer answer, in tokens. Raises TrainingError for a bad picture."""
        rendered = self.render(pair)
        return self._longest(pair.prompt_hash, rendered.prompt, rendered.images, (rendered.chosen, rendered.rejected))


class ThumbRenderer(_Renderer):
    """Renders answers with a thumb, and measures them, as PairRenderer does pairs."""

    def render(self, thumb: Thumb) -> TextThumb:
        """The answer as text."""
        return TextThumb(
            feedback_id=thumb.feedback_id,
            prompt=self._renderer.prompt(thumb.messages),
            answer=self._renderer.answer(thumb.messages, thumb.answer, cut=thumb.cut),
            up=thumb.up,
            images=tuple(thumb.images),
        )

    def is_readable(self, thumb: Thumb) -> bool:
        """Whether each picture has its placeholder in the prompt, and there is no other anywhere."""
        rendered = self.render(thumb)
        return self._readable(rendered.prompt, thumb.images, (rendered.answer,))

    def tokens(self, thumb: Thumb) -> int:
        """Prompt, pictures included, plus the answer, in tokens. Raises TrainingError for a bad picture."""
        rendered = self.render(thumb)
        return self._longest(thumb.prompt_hash, rendered.prompt, rendered.images, (rendered.answer,))
