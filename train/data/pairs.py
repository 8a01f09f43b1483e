"""Pairs as a preference trainer eats them: a rendered prompt, two answers (ended only where the model did), pictures.

Comes in: records' `Pair`s and a way to read pictures. Goes out: `TextPair`s and their length in tokens.
Must not import `serve`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image as Pillow

from noria.errors import NotFound, TrainingError
from noria.records import BLOB_SCHEME, Pair
from train.data.render import ChatRenderer, decode_image
from train.data.samples import LoadImage as LoadImage


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
        pictures = [self._load_image(sha256) for sha256 in pair.images]
        encoded = self._renderer.processor(images=[pictures], text=[pair.prompt], add_special_tokens=False)
        return len(encoded["input_ids"][0])


class ImageCache:
    """Decoded pictures by SHA-256, the `keep` last used ones in memory. `read` gives a picture's bytes."""

    def __init__(self, read: Callable[[str], bytes], keep: int = 64) -> None:
        self._read = read
        self._keep = keep
        self._pictures: OrderedDict[str, Pillow.Image] = OrderedDict()

    def __call__(self, sha256: str) -> Pillow.Image:
        """The picture. Raises TrainingError naming it when it is gone or cannot be decoded."""
        if sha256 not in self._pictures:
            try:
                self._pictures[sha256] = decode_image(self._read(sha256.removeprefix(BLOB_SCHEME)))
            except (OSError, NotFound) as error:
                raise TrainingError(f"picture {sha256} cannot be read: {error}", code="bad_image") from error
            while len(self._pictures) > self._keep:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(sha256)
        return self._pictures[sha256]
