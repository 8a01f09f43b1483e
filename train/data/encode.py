"""From a sample to token ids, labels and the processor's picture tensors.

Comes in: `Sample`s, a checkpoint's processor, a way to load pictures. Goes out: `Encoded`, at most so many tokens long.
Must not import `serve`.

The text is the engine's (`train.data.render`). Labels are the answers' ids, each with its end of turn; everything else
is -100: prompt, pictures, the template's words between turns. A sample that is too long loses text from the right, and
never a part of a picture: the last answer is cut at a character's end, or the conversation ends with an earlier answer;
where neither leaves an answer to learn, the sample is dropped and counted.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image as Pillow

from noria.errors import InvalidRequest, TrainingError
from noria.records import BadRow
from train.data.render import ChatRenderer, parts_of
from train.data.samples import Counts, LoadImage, Sample

IGNORED = -100  # torch's cross-entropy leaves out such labels
_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Encoded:
    """One sample as a model takes it. `picture_tensors` are the processor's, by its names, empty without pictures.

    `input_ids_T`, `labels_T` are long; `token_types_T` is 1 on a picture's tokens and None where the processor has no
    such thing (all but Qwen-VL).
    """

    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    picture_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    token_types_T: torch.Tensor | None = None

    def __len__(self) -> int:
        """Its length in tokens, the pictures' included."""
        return int(self.input_ids_T.shape[0])


@dataclass(frozen=True)
class Measured:
    """Which samples can be trained on (`kept`, their numbers) and how long each is; `bad` have unreadable pictures."""

    kept: list[int]
    lengths: list[int]
    bad: list[BadRow]


@dataclass(frozen=True)
class _Layout:
    """A sample as text: ids of prompt and last answer with one placeholder a picture, and the answers' spans in them.

    `growths` are the tokens that each picture adds to its placeholder; `places` where the placeholders stand.
    """

    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]
    spans: list[tuple[int, int]]
    places: list[int]
    pictures: list[Pillow.Image]
    growths: list[int]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids) + sum(self.growths)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + len(self.answer_ids)


class Encoder:
    """Encodes samples with one checkpoint's processor; `counts` says what became of them.

    `turns`: learn all answers of a conversation, or the last one only. `max_length` is in tokens, pictures included.
    """

    def __init__(
        self,
        processor: Any,
        load_image: LoadImage,
        max_length: int | None = None,
        turns: Literal["all", "last"] = "all",
    ) -> None:
        self.processor = processor
        self.renderer = ChatRenderer(processor)
        self.max_length = max_length
        self.counts = Counts()
        self._tokenizer = self.renderer.tokenizer
        self._load_image = load_image
        self._turns = turns
        self._growth: dict[tuple[int, int], int] = {}
        self._image_id = self._tokenizer.convert_tokens_to_ids(self.renderer.image_token)

    @property
    def pad_id(self) -> int:
        """What fills a batch's rows on the right; its labels are IGNORED and nothing attends to it."""
        for known in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if known is not None:
                return int(known)
        return 0

    def encode(self, sample: Sample) -> Encoded | None:
        """The sample's tensors; None when it was dropped. Raises TrainingError for an unreadable picture."""
        layout = self._fitting(sample)
        return None if layout is None else self._tensors(layout)

    def measure(self, samples: Sequence[Sample], tick: Callable[[int], None] = lambda done: None) -> Measured:
        """One pass over all samples before training: what is dropped now will not be met later.

        A picture is loaded and, for each new size, processed once. `tick` gets the number of samples done.
        """
        kept, lengths, bad = [], [], []
        for number in range(len(samples)):
            sample = samples[number]
            try:
                layout = self._fitting(sample)
            except TrainingError as error:
                self.counts.drop("unreadable picture")
                file, _, line = sample.source.rpartition(":")
                bad.append(BadRow(file, int(line) if line.isdigit() else 0, error.message))
                layout = None
            if layout is not None:
                kept.append(number)
                lengths.append(layout.tokens)
            tick(number + 1)
        return Measured(kept, lengths, bad)

    def _fitting(self, sample: Sample) -> _Layout | None:
        """The layout, shortened where it must be; None, counted, where that is impossible."""
        try:
            layout = self._layout(sample)
            if self.max_length is None or layout.tokens <= self.max_length:
                self.counts.whole += 1
                return layout
            layout = self._shortened(sample, layout, self.max_length)
        except InvalidRequest as error:
            self.counts.drop(error.message)
            return None
        self.counts.shortened += 1
        return layout

    def _shortened(self, sample: Sample, layout: _Layout, limit: int) -> _Layout:
        answer_ids = self._whole_characters(layout.answer_ids, limit - layout.prompt_tokens)
        if answer_ids:
            start = len(layout.prompt_ids)
            return replace(layout, answer_ids=answer_ids, spans=[*layout.spans[:-1], (start, start + len(answer_ids))])
        earlier = [number for number in _answers(sample) if number < len(sample.messages) - 1]
        if not earlier:
            raise InvalidRequest("too long")
        shown = sum(_pictures_in(message) for message in sample.messages[: earlier[-1]])
        sample = replace(sample, messages=sample.messages[: earlier[-1] + 1], images=sample.images[:shown], cut=False)
        layout = self._layout(sample)
        return layout if layout.tokens <= limit else self._shortened(sample, layout, limit)

    def _whole_characters(self, ids: list[int], room: int) -> list[int]:
        """At most `room` ids; none at the end that hold only some bytes of a character."""
        kept = ids[: max(room, 0)]
        while kept and self._tokenizer.decode(kept[-4:]).endswith("\ufffd"):
            kept = kept[:-1]
        return kept

    def _layout(self, sample: Sample) -> _Layout:
        last = len(sample.messages) - 1
        prompt, text = self._prompt(sample, last), self._answer(sample, last)
        prompt_ids, whole_ids = self._ids(prompt), self._ids(prompt + text)
        joined = (
            whole_ids[: len(prompt_ids)] != prompt_ids
        )  # the tokenizer merges across the border: the engine does not
        answer_ids = self._ids(text) if joined else whole_ids[len(prompt_ids) :]
        places = [place for place, token in enumerate(prompt_ids) if token == self._image_id]
        if len(places) != len(sample.images) or self._image_id in answer_ids:
            raise InvalidRequest("placeholders and pictures differ")
        if not answer_ids:
            raise InvalidRequest("empty answer")
        spans = [*self._earlier_spans(sample, prompt, prompt_ids), (len(prompt_ids), len(prompt_ids) + len(answer_ids))]
        pictures = [self._load_image(reference) for reference in sample.images]
        growths = [self._growth_of(picture) for picture in pictures]
        return _Layout(prompt, prompt_ids, answer_ids, spans, places, pictures, growths)

    def _earlier_spans(self, sample: Sample, prompt: str, prompt_ids: list[int]) -> list[tuple[int, int]]:
        """Where the earlier answers lie in the prompt's ids; none unless every border is one between tokens."""
        if self._turns == "last":
            return []
        spans = []
        for number in _answers(sample)[:-1]:
            before = self._prompt(sample, number)
            after = before + self._answer(sample, number)
            borders = [self._ids(text) for text in (before, after)]
            if not prompt.startswith(after) or any(prompt_ids[: len(ids)] != ids for ids in borders):
                self.counts.last_only += 1
                return []
            spans.append((len(borders[0]), len(borders[1])))
        return spans

    def _tensors(self, layout: _Layout) -> Encoded:
        ids, types, tensors = list(layout.prompt_ids), None, {}
        if layout.pictures:
            found = self.processor(
                text=[layout.prompt], images=layout.pictures, return_tensors="pt", add_special_tokens=False
            )
            ids = found["input_ids"][0].tolist()
            if len(ids) != layout.prompt_tokens:
                raise TrainingError(
                    f"the processor made {len(ids)} tokens of a prompt measured as {layout.prompt_tokens}",
                    code="bad_processor",
                )
            types = found.get("mm_token_type_ids")
            tensors = {key: torch.as_tensor(value) for key, value in found.items() if key not in _TOKENS}
        ids += layout.answer_ids
        input_ids_T = torch.tensor(ids)
        labels_T = torch.full_like(input_ids_T, IGNORED)
        for start, end in layout.spans:
            shift = sum(growth for place, growth in zip(layout.places, layout.growths, strict=True) if place < start)
            labels_T[start + shift : end + shift] = input_ids_T[start + shift : end + shift]
        labels_T[0] = IGNORED  # nothing comes before it, not even in a pack
        if types is not None:
            types = torch.nn.functional.pad(torch.as_tensor(types)[0].long(), (0, len(layout.answer_ids)))
        return Encoded(input_ids_T, labels_T, tensors, types)

    def _growth_of(self, picture: Pillow.Image) -> int:
        """How many tokens a picture of this size adds to its placeholder."""
        if picture.size not in self._growth:
            found = self.processor(text=[self.renderer.image_token], images=[picture], add_special_tokens=False)
            self._growth[picture.size] = len(found["input_ids"][0]) - 1
        return self._growth[picture.size]

    def _prompt(self, sample: Sample, number: int) -> str:
        return self.renderer.prompt(sample.messages[:number])

    def _answer(self, sample: Sample, number: int) -> str:
        cut = sample.cut and number == len(sample.messages) - 1
        return self.renderer.answer(sample.messages[:number], _text(sample.messages[number]), cut=cut)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _answers(sample: Sample) -> list[int]:
    """The numbers of the assistant's messages that say something; a tool call alone is context."""
    return [number for number, one in enumerate(sample.messages) if one["role"] == "assistant" and _text(one)]


def _text(message: Any) -> str:
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def _pictures_in(message: Any) -> int:
    return sum(part["type"] == "image" for part in parts_of(message))
