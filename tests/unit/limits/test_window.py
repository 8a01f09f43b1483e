"""The sliding window: never more than N in any span, and whoever waits as told is let in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.access.limits.limits import duration_text
from serve.access.limits.window import SECOND_NS, Window

SPAN = 1_000
GAPS = st.lists(st.integers(0, 700), min_size=1, max_size=200)


@given(GAPS, st.integers(1, 7))
def test_never_more_than_the_limit_in_any_span(gaps: list[int], limit: int) -> None:
    """Whatever the times at which somebody tries."""
    window, now, admitted = Window(SPAN), 0, []
    for gap in gaps:
        now += gap
        if not window.wait_ns(limit, now):
            window.take(now)
            admitted.append(now)
        assert window.used(now) == sum(at > now - SPAN for at in admitted) <= limit
    for at in admitted:
        assert sum(at <= other < at + SPAN for other in admitted) <= limit


@given(GAPS, st.integers(1, 7))
def test_nobody_starves(gaps: list[int], limit: int) -> None:
    """A refusal says the first moment at which one is let in: not before, and then surely; within one span."""
    window, now = Window(SPAN), 0
    for gap in gaps:
        now += gap
        wait = window.wait_ns(limit, now)
        assert 0 <= wait <= SPAN
        if wait:
            assert window.wait_ns(limit, now + wait - 1) == 1
            now += wait
            assert window.wait_ns(limit, now) == 0
        window.take(now)


@given(GAPS)
def test_a_full_span_of_patience_gets_the_whole_limit_back(gaps: list[int]) -> None:
    """And `empty_ns` says when that is."""
    window, now = Window(SPAN), 0
    for gap in gaps:
        now += gap
        if not window.wait_ns(3, now):
            window.take(now)
    left = window.empty_ns(now)
    assert left == 0 or window.used(now + left - 1) > 0
    assert window.used(now + left) == 0


def test_a_lower_limit_waits_for_all_that_are_too_many() -> None:
    """Two must leave before one fits under 1."""
    window = Window(SPAN)
    window.take(0)
    window.take(100)
    assert window.wait_ns(1, 150) == 950


def test_spans_as_openai_writes_them() -> None:
    """Rounded up: nobody comes back too early."""
    told = {0: "0ms", 1: "1ms", 120_000_000: "120ms", 8_640_000_000: "8.64s", 60 * SECOND_NS: "1m0s"}
    assert {span: duration_text(span) for span in told} == told
    assert duration_text(59_999_999_999) == "1m0s" and duration_text(90_500_000_000) == "1m30.5s"
