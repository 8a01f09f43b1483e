"""How the two clients share their methods: a method describes its calls, a client makes them.

A flow is a generator that yields a `Call` (and is sent its answer; an error ends it) or a `Sleep`, and returns the
result. `operation` makes a method of such a generator: on a `Blocking` client it returns the result, on an
`Awaited` one a coroutine of it. Goes out: these. Does no input or output itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request. Query parameters that are None are left out."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """As httpx takes them."""
        params = {key: value for key, value in self.query.items() if value is not None}
        return {"json": self.body, "params": params}


@dataclass(frozen=True)
class Sleep:
    """A pause, in seconds."""

    pause_s: float


Flow = Generator[Call | Sleep, Any, T]


class Blocking(ABC):
    """A client whose methods return results."""

    @abstractmethod
    def _run(self, flow: Flow[T]) -> T:
        """The flow's result."""


class Awaited(ABC):
    """A client whose methods return coroutines."""

    @abstractmethod
    async def _run(self, flow: Flow[T]) -> T:
        """The flow's result."""


class operation(Generic[P, T]):
    """A method of both clients; see the module."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaited, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, client: Any, owner: type) -> Any:
        """The method, bound to its client."""
        if client is None:
            return self

        @wraps(self._describe)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client._run(self._describe(client, *args, **kwargs))

        return method
