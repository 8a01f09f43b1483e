"""Pairs as a preference trainer eats them: a rendered prompt, two answers (ended only where the model did), pictures.

Comes in: records' `Pair`s and a way to read pictures. Goes out: `TextPair`s and their length in tokens.
Must not import `serve`.
"""

from __future__ import annotations

from dataclasses import dataclass

from noria.records import Pair
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


class PairRenderer:
    """Renders pairs with one checkpoint's processor and measures them."""

    def __init__(self, renderer: ChatRenderer, load_image: LoadImage) -> None:
        self._renderer = renderer
        self._load_image = load_image
        self._prompt_tokens: dict[str, int] = {}

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
        rendered, token = self.render(pair), self._renderer.image_token
        written = token in rendered.chosen or token in rendered.rejected
        return rendered.prompt.count(token) == len(pair.images) and not written

    def tokens(self, pair: Pair) -> int:
        """Prompt, pictures included, plus the longer answer, in tokens. Raises TrainingError on an unreadable picture.

        One prompt is measured once: pictures make measuring slow, and a prompt has many pairs.
        """
        rendered = self.render(pair)
        if pair.prompt_hash not in self._prompt_tokens:
            self._prompt_tokens[pair.prompt_hash] = self._count_prompt(rendered)
        tokenizer = self._renderer.tokenizer
        answers = (rendered.chosen, rendered.rejected)
        longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
        return self._prompt_tokens[pair.prompt_hash] + longest

    def _count_prompt(self, pair: TextPair) -> int:
        if not pair.images:
            return len(self._renderer.tokenizer(pair.prompt, add_special_tokens=False)["input_ids"])
        pictures = [self._load_image(one) for one in pair.images]
        encoded = self._renderer.processor(images=[pictures], text=[pair.prompt], add_special_tokens=False)
        return len(encoded["input_ids"][0])
