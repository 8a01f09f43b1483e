"""Who is let in: precedence of the settings, what a refusal uses up, what is forgotten, what is bounded."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from noria.errors import InvalidRequest, NoriaError, RateLimited, SettingsError, Unavailable, openai_body, retry_after
from noria.records import Json
from noria.settings import KeyRules, LimitSettings, load_settings
from serve.access.caller import LOCAL, Caller, Role
from serve.access.limits.http import asks_engine
from serve.access.limits.limits import Limits
from serve.access.limits.load import Meter, Ticket
from serve.access.limits.metrics import LimitsCollector
from serve.access.limits.window import SECOND_NS


class Clock:
    """Both clocks, in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def ns(self) -> int:
        """The monotonic one."""
        return int(self.now_s * SECOND_NS)


def made(settings: Json, clock: Clock | None = None, sequences: int = 4) -> Limits:
    """Limits on a clock that stands still."""
    clock = clock or Clock()
    return Limits(LimitSettings(**settings), sequences, clock_ns=clock.ns, wall=lambda: clock.now_s)


def caller(name: str, *roles: Role) -> Caller:
    """A key of that name."""
    return Caller(f"key_{name}", name, frozenset(roles))


def test_a_key_s_own_word_wins_over_its_roles_and_those_over_every_key_s() -> None:
    """Each limit for itself."""
    limits = made(
        {
            "requests_per_minute": 60,
            "tokens_per_day": 1000,
            "roles": {
                "operator": {"requests_per_minute": "none"},
                "annotator": {"requests_per_minute": 5, "preferences_per_hour": 7},
            },
            "keys": {"app": {"requests_per_minute": 600}, "free": {"tokens_per_day": "none"}},
        }
    )
    assert limits.rules(caller("x", "client")) == KeyRules(60, None, 1000, None)
    assert limits.rules(caller("x", "annotator")) == KeyRules(5, None, 1000, 7)
    assert limits.rules(caller("x", "annotator", "client")) == KeyRules(60, None, 1000, None)  # the most generous
    assert limits.rules(caller("x", "annotator", "operator")) == KeyRules(None, None, 1000, None)
    assert limits.rules(caller("app", "annotator")) == KeyRules(600, None, 1000, 7)
    assert limits.rules(caller("free", "client")) == KeyRules(60, None, None, None)
    assert limits.rules(LOCAL) == KeyRules(60, None, 1000, None)
    assert made({}).rules(LOCAL) == KeyRules()


def test_settings_from_the_environment_and_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names nest; a limit of nothing, an unknown role and an unknown key are refused by name."""
    monkeypatch.setenv("NORIA_LIMITS__KEYS__APP__REQUESTS_PER_MINUTE", "9")
    assert load_settings().limits.rules_of("app", ()).requests_per_minute == 9
    wrong: list[tuple[Json, str]] = [
        ({"requests_per_minute": 0}, "limits.requests_per_minute"),
        ({"roles": {"king": {}}}, "limits.roles.king"),
        ({"keys": {"app": {"request_per_minute": 5}}}, "limits.keys.app.request_per_minute"),
    ]
    for limits, named in wrong:
        with pytest.raises(SettingsError, match=named):
            load_settings(limits=limits)


def test_a_refused_request_uses_nothing_up() -> None:
    """Whatever refused it: a place among the concurrent, a request of the minute, the server's room."""
    clock = Clock()
    limits = made({"requests_per_minute": 2, "concurrent_requests": 1, "waiting": 1}, clock, sequences=1)
    one = limits.enter(caller("a"))
    for _ in range(5):
        with pytest.raises(RateLimited, match="concurrent"):
            limits.enter(caller("a"))
    other = limits.enter(caller("b"))
    for _ in range(5):
        with pytest.raises(Unavailable, match="more to do"):
            limits.enter(caller("c"))
    one.leave()
    other.leave()
    limits.enter(caller("a")).leave()
    with pytest.raises(RateLimited, match="2 requests a minute") as refused:
        limits.enter(caller("a"))
    assert retry_after(refused.value) == "60" and openai_body(refused.value)["error"]["code"] == "rate_limit_exceeded"
    limits.enter(caller("c")).leave()
    assert limits.refused["concurrent_requests"] == limits.refused["waiting"] == 5
    assert limits.load.demand == 0


def test_idle_keys_are_forgotten() -> None:
    """A thousand keys leave nothing behind; one that has a request running stays."""
    clock = Clock()
    limits = made({"requests_per_minute": 5, "concurrent_requests": 5}, clock)
    held = limits.enter(caller("held"))
    for number in range(1000):
        limits.enter(caller(str(number))).leave()
    assert limits.known_keys == 1001
    clock.now_s = 61
    limits.enter(caller("new")).leave()
    assert limits.known_keys == 2
    held.leave()
    clock.now_s = 122
    limits.enter(caller("new")).leave()
    assert limits.known_keys == 1


def test_callers_without_limits_are_not_kept() -> None:
    """Nothing is remembered of them."""
    limits = made({})
    limits.enter(LOCAL).leave()
    assert limits.known_keys == 0 and limits.headers(LOCAL) == []


def params(kind: str, n: int = 1) -> Any:
    """Sampling parameters as far as a meter reads them."""
    return SimpleNamespace(n=n, output_kind=SimpleNamespace(name=kind))


def output(prompt: int | None, *tokens: int) -> Any:
    """An engine's output: so many tokens of each choice."""
    ids = None if prompt is None else [0] * prompt
    parts = [SimpleNamespace(index=index, token_ids=[0] * count) for index, count in enumerate(tokens)]
    return SimpleNamespace(prompt_token_ids=ids, outputs=parts)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("DELTA", [output(7, 1, 0), output(7, 2, 3), output(None, 0, 1)]),
        ("CUMULATIVE", [output(7, 1, 0), output(7, 3, 3), output(None, 3, 4)]),
        ("FINAL_ONLY", [output(7, 3, 4)]),
    ],
)
def test_tokens_are_counted_as_the_usage_counts_them(kind: str, outputs: list[Any]) -> None:
    """The prompt once, every choice's tokens once, however the engine gives them."""
    limits = made({})
    ticket = limits.enter(caller("a"))
    with Meter(ticket, params(kind, 2)) as meter:
        for one in outputs:
            meter.take(one)
        meter.broken_off({"prompt_token_ids": [0] * 7}, 7)  # all was seen: a late break-off adds nothing
    assert limits.tokens.used("key_a") == 14
    ticket.leave()


def test_what_is_broken_off_counts_what_was_made() -> None:
    """Before any output too: the prompt was read, and the engine's tokens were made."""
    limits = made({})
    ticket = limits.enter(caller("a"))
    with Meter(ticket, params("FINAL_ONLY")) as meter:
        meter.broken_off({"prompt_token_ids": [0] * 7}, 30)
    with Meter(ticket, params("DELTA")) as meter:
        meter.take(output(5, 2))
        meter.broken_off({"prompt_token_ids": [0] * 5}, 4)
    assert limits.tokens.used("key_a") == 37 + 9
    ticket.leave()


def test_a_place_is_held_until_the_last_sequence_has_ended() -> None:
    """An answer that goes on in the background (Responses API) keeps its key's place, and gives it back once."""
    limits = made({"concurrent_requests": 1})
    ticket = limits.enter(caller("a"))
    meter = Meter(ticket, params("DELTA", 3))
    assert limits.load.demand == 3
    ticket.leave()
    assert limits.load.demand == 3
    with pytest.raises(RateLimited):
        limits.enter(caller("a"))
    meter.__exit__(None, None, None)
    assert limits.load.demand == 0
    with Meter(ticket, params("DELTA")):  # even later: counted as load, its place is gone
        assert limits.load.demand == 1
    limits.enter(caller("a")).leave()
    assert limits.describe(caller("a"))["concurrent_requests"] == {"limit": 1, "used": 0}


def test_demand_is_bounded_whatever_requests_split_into() -> None:
    """A random walk of requests and generations: never past the bound, and nothing is left at the end."""
    limits = made({"waiting": 3}, sequences=2)
    rng = random.Random(7)  # noqa: S311
    tickets: list[Ticket] = []
    meters: list[Meter] = []
    for _ in range(5000):
        what = rng.random()
        try:
            if what < 0.3:
                tickets.append(limits.enter(caller("a")))
            elif what < 0.6 and tickets:
                meters.append(Meter(rng.choice(tickets), params("DELTA", rng.randint(1, 9))))
            elif what < 0.8 and meters:
                meters.pop(rng.randrange(len(meters))).__exit__(None, None, None)
            elif tickets:
                tickets.pop(rng.randrange(len(tickets))).leave()
        except (Unavailable, InvalidRequest) as error:
            assert error.code in ("overloaded", "too_many_sequences")
        assert 0 <= limits.load.demand <= limits.load.most_demand == 14
    for meter in meters:
        meter.__exit__(None, None, None)
    for ticket in tickets:
        ticket.leave()
    assert limits.load.demand == 0
    assert limits.refused["waiting"] and limits.refused["sequences"]


def test_the_pace_says_when_to_come_back() -> None:
    """Half of what waits, at the pace of the last requests; within a minute."""
    clock = Clock()
    limits = made({"waiting": 8}, clock, sequences=1)
    for _ in range(10):
        clock.now_s += 2
        limits.enter(LOCAL).leave()
    for _ in range(9):
        limits.enter(LOCAL)
    with pytest.raises(Unavailable) as refused:
        limits.enter(LOCAL)
    assert retry_after(refused.value) == "8"  # ten ended within 18 s, four must end
    clock.now_s += 1000
    with pytest.raises(Unavailable) as refused:
        limits.enter(LOCAL)
    assert retry_after(refused.value) == "60"


def test_which_requests_ask_the_engine() -> None:
    """All that vLLM answers by POST, known to us or not, but for those known to cost nothing."""
    for path in ("chat/completions", "completions", "responses", "messages", "embeddings", "chat/completions/batch"):
        assert asks_engine("POST", f"/v1/{path}") and not asks_engine("GET", f"/v1/{path}")
    for path in ("/tokenize", "/inference/v1/generate", "/invocations", "/v1/chat/completions/chatcmpl-1/render"):
        assert asks_engine("POST", path)
    for path in (
        "/noria/v1/samples",
        "/noria/v1/preferences",
        "/ping",
        "/v1/responses/resp_1/cancel",
        "/v1/chat/completions/chatcmpl-1",
    ):
        assert not asks_engine("POST", path)


def test_counters_for_prometheus() -> None:
    """Each reason from the start, and what is inside."""
    limits = made({"waiting": 1}, sequences=1)
    limits.enter(LOCAL)
    limits.enter(LOCAL)
    with pytest.raises(NoriaError):
        limits.enter(LOCAL)
    hold = limits.body()
    assert hold.grow(500) is None and hold.grow(400) is None
    registry = CollectorRegistry()
    registry.register(LimitsCollector(limits))
    assert registry.get_sample_value("noria_requests_refused_total", {"reason": "waiting"}) == 1
    assert registry.get_sample_value("noria_requests_refused_total", {"reason": "tokens_per_day"}) == 0
    assert registry.get_sample_value("noria_requests_waiting") == 1
    assert registry.get_sample_value("noria_requests_inside") == 2
    assert registry.get_sample_value("noria_body_bytes") == 500
    hold.leave()
    hold.leave()
    assert registry.get_sample_value("noria_body_bytes") == 0
