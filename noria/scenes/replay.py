"""Conversations without pictures that keep a language model's language while it learns to see.

Comes in: how many, a seed. Goes out: rows in OpenAI's shape. The answers are SmolLM2-135M-Instruct's own, greedy: a
model that repeats itself changes least. The file is in `data/`; none of its questions is asked in an evaluation.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files

from noria.records import Json


def replayed(count: int | None, seed: int) -> Iterator[Json]:
    """The conversations in an order that the seed decides, from the start again where `count` is beyond them."""
    texts = _texts()
    for index in range(len(texts) if count is None else count):
        if index % len(texts) == 0:
            order = random.Random(f"{seed}/{index}").sample(texts, len(texts))  # noqa: S311 - no secret
        yield json.loads(order[index % len(texts)])


@lru_cache(maxsize=1)
def _texts() -> tuple[str, ...]:
    packed = (files("noria.scenes") / "data" / "replay.jsonl.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode().splitlines())
