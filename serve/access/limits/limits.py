"""The limits of every key and of the server: who is let in, and what an answer tells of it.

Comes in: a `Caller` at a door. Goes out: a `Ticket`, or RateLimited, QuotaExceeded or Unavailable, each of which says
when to come back. One object serves HTTP and gRPC; nothing here waits, and nothing here asks the store.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from noria.errors import NoriaError, QuotaExceeded, RateLimited
from noria.records import Json
from noria.settings import KeyRules, LimitSettings
from serve.access.caller import LOCAL, Caller
from serve.access.limits.load import BodyHold, Load, Ticket
from serve.access.limits.tokens import TokenBook, TokenStore
from serve.access.limits.window import SECOND_NS, Window

MINUTE_NS = 60 * SECOND_NS
WAITING_PER_SEQUENCE = 16
CONCURRENT_RETRY_S = 1.0  # nobody knows when one of the key's own requests ends
MOST_RULES = 4096
REASONS = (
    "requests_per_minute",
    "concurrent_requests",
    "tokens_per_day",
    "preferences_per_hour",
    "waiting",
    "sequences",
    "body_bytes",
)


class _Key:
    """What one key is using. Only keys with limits on requests have one."""

    __slots__ = ("concurrent", "window")

    def __init__(self) -> None:
        self.window, self.concurrent = Window(MINUTE_NS), 0


class Limits:
    """Asked by both doors. Idle keys are forgotten after a minute or two."""

    def __init__(
        self,
        settings: LimitSettings,
        sequences: int,
        store: TokenStore | None = None,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`sequences` is how many the engine runs at once."""
        waiting = settings.waiting or WAITING_PER_SEQUENCE * sequences
        self.settings = settings
        self.load = Load(sequences, waiting, settings.body_bytes_in_flight, clock_ns)
        self.tokens = TokenBook(store, wall)
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._clock_ns = clock_ns
        self._rules: dict[Caller, KeyRules] = {}
        self._keys: dict[str, _Key] = {}
        self._swept_ns = clock_ns()

    @property
    def known_keys(self) -> int:
        """Keys of which something is kept in memory."""
        return len(self._keys)

    def rules(self, caller: Caller) -> KeyRules:
        """What holds for the caller. Roles say nothing of `LOCAL`, who has them all for want of keys."""
        found = self._rules.get(caller)
        if found is None:
            if len(self._rules) >= MOST_RULES:
                self._rules.clear()
            roles = () if caller == LOCAL else caller.roles
            found = self._rules[caller] = self.settings.rules_of(caller.name, roles)
        return found

    def check(self, caller: Caller) -> None:
        """Raises what `enter` would raise now, and takes nothing: for a door that has yet to read the request."""
        rules, now = self.rules(caller), self._clock_ns()
        if rules.tokens_per_day is not None:
            self._check_tokens(caller, rules.tokens_per_day)
        key = self._keys.get(caller.key_id)
        if key is not None:
            if rules.requests_per_minute is not None:
                self._check_requests(key, rules.requests_per_minute, now)
            if rules.concurrent_requests is not None and key.concurrent >= rules.concurrent_requests:
                raise self.refuse(
                    "concurrent_requests",
                    RateLimited(
                        f"limit of {rules.concurrent_requests} concurrent requests reached: wait for one to end",
                        retry_after_s=CONCURRENT_RETRY_S,
                    ),
                )
        fault = self.load.fault()
        if fault is not None:
            raise self.refuse("waiting", fault)

    def enter(self, caller: Caller) -> Ticket:
        """Lets a request to the engine in; `leave` the ticket at its end, whatever that is.

        Raises QuotaExceeded, RateLimited or Unavailable; a request that is refused uses nothing up.
        """
        self.check(caller)
        rules, now = self.rules(caller), self._clock_ns()
        key: _Key | None = None
        if rules.requests_per_minute is not None or rules.concurrent_requests is not None:
            self._sweep(now)
            key = self._keys.setdefault(caller.key_id, _Key())
            key.concurrent += 1
            if rules.requests_per_minute is not None:
                key.window.take(now)
        return _ticket(self, caller.key_id, key)

    def body(self) -> BodyHold:
        """Room for one request's body, empty yet."""
        return BodyHold(self.load)

    def refuse(self, reason: str, error: NoriaError) -> NoriaError:
        """Counts a refusal; the caller raises what it gives back."""
        self.refused[reason] += 1
        return error

    def headers(self, caller: Caller) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*-requests`; none where the caller has no limit on requests."""
        limit = self.rules(caller).requests_per_minute
        if limit is None:
            return []
        used, empty_ns = self._window_of(caller)
        return [
            (b"x-ratelimit-limit-requests", str(limit).encode()),
            (b"x-ratelimit-remaining-requests", str(max(0, limit - used)).encode()),
            (b"x-ratelimit-reset-requests", duration_text(empty_ns).encode()),
        ]

    def describe(self, caller: Caller) -> Json:
        """The caller's limits and what is used of them (None where nobody counts), but for preferences: those are
        counted in the store."""
        rules, key = self.rules(caller), self._keys.get(caller.key_id)
        used, empty_ns = self._window_of(caller)
        return {
            "object": "limits",
            "key": caller.name,
            "requests_per_minute": {
                "limit": rules.requests_per_minute,
                "used": None if rules.requests_per_minute is None else used,
                "reset_s": round(empty_ns / SECOND_NS, 3),
            },
            "concurrent_requests": {
                "limit": rules.concurrent_requests,
                "used": None if rules.concurrent_requests is None else key.concurrent if key else 0,
            },
            "tokens_per_day": {
                "limit": rules.tokens_per_day,
                "used": self.tokens.used(caller.key_id),
                "reset_s": round(self.tokens.left_s(), 3),
            },
        }

    def _window_of(self, caller: Caller) -> tuple[int, int]:
        key, now = self._keys.get(caller.key_id), self._clock_ns()
        return (key.window.used(now), key.window.empty_ns(now)) if key else (0, 0)

    def _check_tokens(self, caller: Caller, limit: int) -> None:
        used = self.tokens.used(caller.key_id)
        if used >= limit:
            raise self.refuse(
                "tokens_per_day",
                QuotaExceeded(
                    f"{used} of the day's {limit} tokens are used: the next day begins at midnight UTC",
                    retry_after_s=self.tokens.left_s(),
                ),
            )

    def _check_requests(self, key: _Key, limit: int, now: int) -> None:
        wait_ns = key.window.wait_ns(limit, now)
        if wait_ns:
            # Exact in whole seconds: a float would round some waits down below a whole number.
            wait_s = -(-wait_ns // SECOND_NS)
            raise self.refuse(
                "requests_per_minute",
                RateLimited(
                    f"limit of {limit} requests a minute reached: try again in {wait_s} s", retry_after_s=wait_s
                ),
            )

    def _sweep(self, now: int) -> None:
        """Forgets idle keys, once a minute."""
        if now - self._swept_ns >= MINUTE_NS:
            self._swept_ns = now
            idle = [id_ for id_, key in self._keys.items() if not key.concurrent and not key.window.used(now)]
            for id_ in idle:
                del self._keys[id_]


def _ticket(limits: Limits, key_id: str, key: _Key | None) -> Ticket:
    def spend(tokens: int) -> None:
        limits.tokens.add(key_id, tokens)

    def end() -> None:
        if key is not None:
            key.concurrent -= 1

    return Ticket(limits.load, on_tokens=spend, on_end=end, refuse=limits.refuse)


def duration_text(span_ns: int) -> str:
    """A span as OpenAI's headers write it: `120ms`, `8.64s`, `1m0s`."""
    ms = -(-span_ns // 1_000_000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms / 1000:g}s" if minutes else f"{rest_ms / 1000:g}s"
