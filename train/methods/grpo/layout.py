"""Answers to prompts as the rows of one forward; a prompt that several answers share is computed once.

Comes in: rows of token ids, a prompt and some of its answers each. Goes out: the model's inputs, and where among its
hidden states each answer's tokens are predicted. Must not import `serve`.

A row with several answers is the prompt and, behind it, one answer after the other. A mask lets an answer see the
prompt and itself, and its positions go on where the prompt's end, so that each answer's numbers are those that it has
alone: with P prompt tokens and G answers of C, a row has P + G C tokens in place of G (P + C). Every answer gets a row
of its own where the attention takes no such mask, where a row is longer than the model's window, and where answers are
so long beside their prompt that attention over all of them costs more than running the prompt again.

Shapes: R rows, T tokens of the longest, B answers over all rows, C tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from train.data.collate import join_pictures

MASKED_ATTENTION = ("sdpa", "eager")  # those of transformers that take a ready mask of (R, 1, T, T)
RopeIndex = Callable[..., tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Row:
    """One prompt's token ids, pictures expanded, and some of its answers'; the pictures' tensors as a processor's."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Layout:
    """A forward's `inputs`, the answers' ids and mask (B, C), and `places_BC`: in the rows laid end to end, the token
    whose output predicts each of an answer's tokens."""

    inputs: dict[str, Any]
    ids_BC: torch.Tensor
    mask_BC: torch.Tensor
    places_BC: torch.Tensor


class Layouts:
    """Lays rows out for one model."""

    def __init__(self, model: Any, *, pad_id: int, share_prompts: bool = True) -> None:
        """`model` is transformers' own, not wrapped."""
        text = model.config.get_text_config()
        self.image_id = int(model.config.image_token_id)
        self._attention = str(text._attn_implementation)
        self._share = share_prompts and self._attention in MASKED_ATTENTION
        self._window = getattr(text, "sliding_window", None)
        self._width = int(text.hidden_size)
        self._rope_index: RopeIndex | None = getattr(model.model, "get_rope_index", None)
        self._pad_id = pad_id

    def lay_out(self, rows: Sequence[Row]) -> Layout:
        """The rows' forward, its answers in the order of the rows."""
        together = self._share and self._fits(rows) and self._cheaper(rows)
        laid = list(rows) if together else [Row(r.prompt, (one,), r.pictures) for r in rows for one in r.answers]
        ids_RT = _padded([[*row.prompt, *(t for one in row.answers for t in one)] for row in laid], self._pad_id)
        inputs: dict[str, Any] = {"input_ids": ids_RT, "use_cache": False}
        if any(len(row.answers) > 1 for row in laid):
            allowed_RTT = torch.stack([_allowed(row, ids_RT.shape[1]) for row in laid])[:, None]
            inputs["attention_mask"] = allowed_RTT if self._attention == "sdpa" else _added(allowed_RTT)
            inputs["position_ids"] = _stacked([self._positions(row) for row in laid], ids_RT.shape[1])
        else:
            inputs["attention_mask"] = _padded([[1] * row.tokens for row in laid], 0)
            if self._rope_index is not None:
                inputs["mm_token_type_ids"] = (ids_RT == self.image_id).long()
        inputs |= join_pictures([row.pictures for row in laid], rows=True) if any(r.pictures for r in laid) else {}
        answers = [one for row in laid for one in row.answers]
        return Layout(
            inputs=inputs,
            ids_BC=_padded(answers, self._pad_id),
            mask_BC=_padded([[1] * len(one) for one in answers], 0),
            places_BC=_padded(_places(laid, ids_RT.shape[1]), 0),
        )

    def _fits(self, rows: Sequence[Row]) -> bool:
        return self._window is None or max(row.tokens for row in rows) <= self._window

    def _cheaper(self, rows: Sequence[Row]) -> bool:
        """A layer of width D costs some 24 D D a token for its linears and 4 D T for its attention over T tokens."""

        def cost(tokens: int) -> int:
            return tokens * (6 * self._width + tokens)

        alone = sum(cost(len(row.prompt) + len(one)) for row in rows for one in row.answers)
        return sum(cost(row.tokens) for row in rows) <= alone

    def _positions(self, row: Row) -> torch.Tensor:
        """(1, T), or (4, T) where pictures have rows and columns: the order, then time, height and width."""
        length = len(row.prompt)
        prompt = torch.arange(length)[None]
        after = length
        if self._rope_index is not None:
            ids = torch.tensor([row.prompt])
            grid = row.pictures.get("image_grid_thw")
            types = (ids == self.image_id).long()
            found = self._rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)[0][:, 0]
            after = int(found.max()) + 1
            prompt = torch.cat([prompt, found])
        parts = [prompt]
        for one in row.answers:
            steps = torch.arange(len(one))
            parts.append(torch.stack([length + steps, *[after + steps] * (len(prompt) - 1)]))
        return torch.cat(parts, dim=1)


def _allowed(row: Row, width: int) -> torch.Tensor:
    """(T, T): which token (column) each token (row) may look at. Padding looks at itself, so that nothing is 0 / 0."""
    allowed = torch.eye(width, dtype=torch.bool)
    length = len(row.prompt)
    allowed[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    start = length
    for one in row.answers:
        end = start + len(one)
        allowed[start:end, :length] = True
        allowed[start:end, start:end] = torch.ones(len(one), len(one), dtype=torch.bool).tril()
        start = end
    return allowed


def _added(allowed: torch.Tensor) -> torch.Tensor:
    """The same as a term of the scores, for attention that is written out."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _places(rows: Sequence[Row], width: int) -> list[list[int]]:
    """An answer's first token is predicted at the prompt's last, every other at the one before it."""
    places = []
    for number, row in enumerate(rows):
        start = number * width + len(row.prompt)
        last = start - 1
        for one in row.answers:
            places.append([last, *range(start, start + len(one) - 1)])
            start += len(one)
    return places


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _stacked(positions: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """(R, T), or (4, R, T)."""
    filled = [torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in positions]
    stacked = torch.stack(filled, dim=1)
    return stacked[0] if len(stacked) == 1 else stacked
