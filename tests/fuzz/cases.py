"""One malformed request of each kind, and how many of them are drawn.

Comes in: hypothesis strategies. Goes out: lists of cases, the same ones for the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")
MOST_ROUNDS = 50
COMPLETION = f"chatcmpl-{0:032x}"
"""Stands in every case for the id of a completion that is stored, so that what is behind the look-up is reached too."""


@dataclass(frozen=True)
class HttpCase:
    """A request whose frame is right and whose content need not be."""

    kind: str
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GrpcCase:
    """A call with these bytes as its messages: one, or as many as its stream has."""

    kind: str
    method: str
    messages: tuple[bytes, ...]


@dataclass(frozen=True)
class RawCase:
    """Bytes on a bare connection, after which the sender says no more; `wire` is http or grpc."""

    kind: str
    wire: str
    data: bytes


Case = HttpCase | GrpcCase | RawCase


def about(case: Case, completion_id: str) -> Case:
    """The case with a real completion's id; in protobuf only one of the same length can take the place."""
    old, new = COMPLETION.encode(), completion_id.encode()
    if isinstance(case, HttpCase):
        return replace(case, path=case.path.replace(COMPLETION, completion_id), body=case.body.replace(old, new))
    if isinstance(case, GrpcCase) and len(old) == len(new):
        return replace(case, messages=tuple(one.replace(old, new) for one in case.messages))
    return case


def drawn(strategy: SearchStrategy[T], count: int, number: int) -> list[T]:
    """`count` values of the strategy; `number` is the seed. Raises RuntimeError where it has not as many."""
    values: list[T] = []
    for turn in range(MOST_ROUNDS):

        @seed(number * MOST_ROUNDS + turn)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def take(value: T) -> None:
            values.append(value)

        take()
        if len(values) >= count:
            return values[:count]
    raise RuntimeError(f"{strategy!r} gave {len(values)} values, not {count}")
