"""How much is inside the server: requests and the engine's sequences that are theirs, and bytes of bodies.

Comes in: requests at the door, generations at the engine. Goes out: refusals, and a `Ticket` for as long as a request
is inside. Pure bookkeeping on one event loop. Must not import vllm, fastapi, grpc or the engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from noria.errors import InvalidRequest, NoriaError, TooLarge, Unavailable
from serve.access.limits.window import SECOND_NS

BURST = 4  # requests that are inside may still split into sequences, up to so many times what may wait
SEEN = 64  # ends of requests from which the pace is told
LONGEST_RETRY_S = 60.0


class Load:
    """What is inside, and what still fits."""

    def __init__(
        self, sequences: int, waiting: int, body_bytes: int, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """`sequences` run at once, `waiting` may wait for them, bodies may hold `body_bytes`."""
        self.sequences, self.most_waiting, self.most_body_bytes = sequences, waiting, body_bytes
        self.demand = 0  # for each request inside: its sequences, at least one
        self.body_bytes = 0
        self._clock_ns = clock_ns
        self._ends: deque[int] = deque(maxlen=SEEN)

    @property
    def waiting(self) -> int:
        """Requests (sequences, of those that have several) that the engine cannot run yet."""
        return max(0, self.demand - self.sequences)

    @property
    def most_demand(self) -> int:
        """What is never exceeded, whatever the requests inside split into."""
        return self.sequences + BURST * self.most_waiting

    def fault(self) -> NoriaError | None:
        """Why one more request cannot wait; None where it can."""
        if self.waiting < self.most_waiting:
            return None
        return overloaded(f"{self.waiting} requests wait for the engine", self.retry_after_s())

    def body_fault(self, size: int) -> NoriaError | None:
        """Why a body of so many more bytes cannot be taken in; None where it can."""
        if size > self.most_body_bytes:
            said = f"the body has {size} bytes; this server takes {self.most_body_bytes} (limits.body_bytes_in_flight)"
            return TooLarge(said, param="body")
        if self.body_bytes + size <= self.most_body_bytes:
            return None
        return overloaded(f"bodies of {self.body_bytes} bytes are held", self.retry_after_s())

    def split_fault(self, mine: int, more: int) -> NoriaError | None:
        """Why a request with `mine` sequences cannot have `more`; None where it can."""
        if mine + more > self.most_demand:
            return InvalidRequest(
                f"the request asks for {mine + more} or more sequences at once; this server takes {self.most_demand}",
                param="n",
                code="too_many_sequences",
            )
        if self.demand + more - (not mine) <= self.most_demand:
            return None
        return overloaded(f"{self.demand} sequences are inside", self.retry_after_s())

    def ended(self) -> None:
        """Notes that a request has left."""
        self._ends.append(self._clock_ns())

    def retry_after_s(self) -> float:
        """About when half of what waits is gone, at the pace of the last requests; between 1 and 60 s.

        Half: all that are turned away come back at about that time.
        """
        if len(self._ends) < 2:
            return 1.0
        took_s = max(1, self._clock_ns() - self._ends[0]) / SECOND_NS
        return min(LONGEST_RETRY_S, max(1.0, self.waiting / 2 * took_s / len(self._ends)))


class Ticket:
    """One request's place inside. It is given back when the request is answered and its last sequence has ended."""

    __slots__ = ("_inside", "_load", "_on_end", "_on_tokens", "_over", "_refuse", "_sequences", "_weight")

    def __init__(
        self,
        load: Load,
        *,
        on_tokens: Callable[[int], None],
        on_end: Callable[[], None],
        refuse: Callable[[str, NoriaError], NoriaError],
    ) -> None:
        """`refuse` counts a refusal and gives it back, to be raised."""
        self._load, self._on_tokens, self._on_end, self._refuse = load, on_tokens, on_end, refuse
        self._inside, self._over, self._sequences, self._weight = True, False, 0, 1
        load.demand += 1

    def spend(self, tokens: int) -> None:
        """Counts tokens for the request's key."""
        self._on_tokens(tokens)

    def begin(self, sequences: int) -> None:
        """Takes the engine's sequences in. Raises Unavailable or InvalidRequest where they do not fit."""
        fault = self._load.split_fault(self._sequences, sequences)
        if fault is not None:
            raise self._refuse("sequences", fault)
        self._change(sequences)

    def end(self, sequences: int) -> None:
        """Gives them back."""
        self._change(-sequences)

    def leave(self) -> None:
        """The request is answered, or its client has gone. Once is enough; more does nothing."""
        if self._inside:
            self._inside = False
            self._change(0)

    def _change(self, sequences: int) -> None:
        self._sequences += sequences
        weight = max(int(self._inside), self._sequences)
        self._load.demand += weight - self._weight
        self._weight = weight
        if not (weight or self._over):  # what an answered request still begins has no place of its own any more
            self._over = True
            self._load.ended()
            self._on_end()


class BodyHold:
    """The bytes of one request's body, for as long as the request holds them."""

    __slots__ = ("_load", "bytes")

    def __init__(self, load: Load) -> None:
        self._load, self.bytes = load, 0

    def grow(self, size: int) -> NoriaError | None:
        """Has the body be at least `size` bytes; gives the reason where that does not fit."""
        more = size - self.bytes
        if more <= 0:
            return None
        fault = self._load.body_fault(size if size > self._load.most_body_bytes else more)
        if fault is None:
            self.bytes = size
            self._load.body_bytes += more
        return fault

    def leave(self) -> None:
        """Gives the bytes back; more than once does nothing."""
        self._load.body_bytes -= self.bytes
        self.bytes = 0


class Meter:
    """Counts one generation's tokens as the answer's usage counts them, also where the answer is broken off.

    The prompt counts once, each choice's tokens count; of what the engine gives in the same pieces as the client asked
    for (all that is new, all so far, all at the end).
    """

    __slots__ = ("_counted", "_delta", "_n", "_prompt", "_said", "_ticket", "at_end_only")

    def __init__(self, ticket: Ticket | None, sampling_params: Any) -> None:
        """Raises Unavailable or InvalidRequest where the sequences do not fit."""
        kind = getattr(getattr(sampling_params, "output_kind", None), "name", "")
        self._ticket, self._n = ticket, getattr(sampling_params, "n", None) or 1
        self._delta = kind == "DELTA"
        self.at_end_only = ticket is not None and kind == "FINAL_ONLY"
        self._prompt, self._said = False, 0
        self._counted: dict[int, int] = {}
        if ticket is not None:
            ticket.begin(self._n)

    def take(self, output: Any) -> None:
        """Counts what is new in the engine's output."""
        if self._ticket is None:
            return
        tokens = 0
        for part in output.outputs:
            if self._delta:
                tokens += len(part.token_ids)
            else:
                so_far = len(part.token_ids)
                tokens += so_far - self._counted.get(part.index, 0)
                self._counted[part.index] = so_far
        self._said += tokens
        if not self._prompt:
            self._prompt = True
            tokens += len(output.prompt_token_ids or ())
        self._ticket.spend(tokens)

    def broken_off(self, prompt: Any, generated: int) -> None:
        """Counts what nobody will see of a generation: its prompt, where no output came, and the engine's tokens."""
        if self._ticket is None:
            return
        tokens = max(0, generated - self._said)
        self._said += tokens
        if not self._prompt:
            self._prompt = True
            ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
            tokens += len(ids or ())
        self._ticket.spend(tokens)

    @property
    def counts(self) -> bool:
        """Whether anybody's tokens are counted here."""
        return self._ticket is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The generation is over."""
        if self._ticket is not None:
            self._ticket.end(self._n)
            self._ticket = None


def overloaded(because: str, retry_after_s: float) -> Unavailable:
    """The refusal of a server that has enough to do."""
    return Unavailable(
        f"the server has more to do than it can ({because}): try again later",
        code="overloaded",
        retry_after_s=retry_after_s,
    )


current_ticket: ContextVar[Ticket | None] = ContextVar("noria_ticket", default=None)
"""The ticket of the request that runs in this task; None for what is no user's (probes, sampling)."""
