"""A small slice of the fuzzing in every test run, over the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.contract.conftest import System, fake_system
from tests.fuzz.cases import about
from tests.fuzz.plan import batches
from tests.fuzz.send import Sender, Tally

REQUESTS = 500
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system over the fake engine."""
    with fake_system(tmp_path_factory.mktemp("fuzz") / "home") as made:
        yield made


def test_malformed_requests_are_refused_and_nothing_breaks(system: System) -> None:
    """No 500, INTERNAL or UNKNOWN, no hang, every refusal says why; then both doors answer a good request."""
    sender = Sender(str(system.http.client.base_url), system.grpc.address, limit_s=LIMIT_S)
    tally = Tally()
    completion_id = system.http.chat("which?", n=2, seed=1, temperature=1, store=True)["id"]
    for cases in batches(REQUESTS, seed=1):
        asyncio.run(sender.send([about(case, completion_id) for case in cases], tally))
    assert not tally.failed, "\n".join(tally.failures)
    assert tally.sent >= REQUESTS
    statuses = {status for counts in tally.counts.values() for status in counts}
    assert "RESOURCE_EXHAUSTED" not in statuses  # an error too long for its metadata
    assert {"400", "404", "200", "INVALID_ARGUMENT", "NOT_FOUND", "OK", "closed"} <= statuses
    for door in (system.http, system.grpc):
        assert door.chat("still there?", max_tokens=2, temperature=0)["model_version"] == "v1"
