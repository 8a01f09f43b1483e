"""A sliding window, exact: never more than N within any span of its length.

Comes in: admissions, on a clock in whole nanoseconds (so that no rounding lets one in early or late). Goes out: when
the next one may come in. It keeps the time of each admission that still counts, so at most N numbers. Imports nothing
of Noria.
"""

from __future__ import annotations

from collections import deque

SECOND_NS = 1_000_000_000


class Window:
    """The admissions of the last `span_ns` nanoseconds. One at `t` counts until just before `t + span_ns`."""

    __slots__ = ("_span_ns", "_times")

    def __init__(self, span_ns: int) -> None:
        self._span_ns = span_ns
        self._times: deque[int] = deque()

    def used(self, now_ns: int) -> int:
        """How many admissions count now."""
        times, gone = self._times, now_ns - self._span_ns
        while times and times[0] <= gone:
            times.popleft()
        return len(times)

    def wait_ns(self, limit: int, now_ns: int) -> int:
        """How long until one more fits under `limit`; 0 where it fits now."""
        over = self.used(now_ns) - limit
        return 0 if over < 0 else self._times[over] + self._span_ns - now_ns

    def take(self, now_ns: int) -> None:
        """Counts one admission."""
        self._times.append(now_ns)

    def empty_ns(self, now_ns: int) -> int:
        """How long until nothing counts any more."""
        return self._times[-1] + self._span_ns - now_ns if self.used(now_ns) else 0
