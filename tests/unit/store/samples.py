"""Records that the store's tests write."""

from __future__ import annotations

from typing import Any

from noria.records import Choice, Completion, Image, Version

PICTURE = Image("a" * 64, "image/png", 70, 2, 3)


def completion(id_: str = "c1", texts: tuple[str, ...] = ("short", "a longer answer"), **changes: Any) -> Completion:
    """A completion with one choice for each of `texts`."""
    values: dict[str, Any] = {
        "id": id_,
        "created_at": 100.0,
        "model": "noria",
        "model_version": "v1",
        "messages": ({"role": "user", "content": "How many?"},),
        "params": {"temperature": 0.7, "n": len(texts)},
        "prompt_hash": "p1",
        "choices": tuple(
            Choice(
                i, text, {"role": "assistant", "content": text}, (5, 2**40, i), (-0.1, -2.5e-7, float("-inf")), "stop"
            )
            for i, text in enumerate(texts)
        ),
        "prompt_token_ids": (1, 2, 3),
        "usage": {"total_tokens": 6},
    }
    return Completion(**{**values, **changes})


def version(id_: str = "v1", **changes: Any) -> Version:
    """A candidate."""
    values: dict[str, Any] = {"parent": None, "state": "candidate", "method": "dpo", "job": None, "created_at": 5.0}
    return Version(id=id_, **{**values, **changes})
