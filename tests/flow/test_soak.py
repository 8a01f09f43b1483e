"""A short soak on a real engine: what three minutes of 200 clients promise holds for 8 clients and 5 seconds."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.servers import publish_tiny, start_server
from tests.soak.run import Plan, soak

PLAN = Plan(clients=8, seconds=5.0, dawdlers=4, head_s=1.0, stalled_s=2.0, among=2)


def test_a_short_soak_keeps_its_promises(tmp_path: Path) -> None:
    """Every finished answer is stored, nothing grows, dawdlers are ended and stop nobody."""
    publish_tiny(tmp_path)
    with start_server(tmp_path, **PLAN.environment) as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        told = soak(server, PLAN)
    assert told["crowd"]["answers"] >= PLAN.clients
    assert set(told["crowd"]["answers_by_wire"]) == {"http", "grpc"}
    said = document["paths"]["/noria/v1/preferences"]["post"]["requestBody"]["content"]["application/json"]
    assert "chosen" in said["schema"]["properties"]  # vLLM's own document has our routes
    broken = [promise for promise, kept in told["promises"].items() if not kept]
    assert not broken, (broken, told)
