"""The HTTP guard over a small application: what stays open, who the caller is inside, what it writes down itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from noria.settings import ServerSettings
from noria.store import Store
from serve.access.audit import Audit
from serve.access.caller import LOCAL, current_caller, current_wire
from serve.access.guards.http import AccessMiddleware
from serve.access.keys import Access
from serve.access.start import AccessCollector


async def whoami(request: Request) -> JSONResponse:
    """The caller inside; `?status=` is the answer's."""
    caller = current_caller.get()
    told = {"caller": caller.key_id, "wire": current_wire.get()}
    return JSONResponse(told, status_code=int(request.query_params.get("status", "200")))


async def streamed(request: Request) -> StreamingResponse:
    """The caller as the body's task sees it."""

    async def body() -> AsyncIterator[str]:
        yield current_caller.get().key_id

    return StreamingResponse(body())


async def broken(request: Request) -> JSONResponse:
    """A bug."""
    raise ZeroDivisionError


PATHS = ("/health", "/ping", "/metrics", "/v1/models", "/sleep", "/v1/completions", "/noria/v1/status")
METHODS = ["GET", "POST", "OPTIONS"]


class Guarded:
    """The application behind its guard, over a store."""

    def __init__(self, store: Store, server: ServerSettings) -> None:
        self.store = store
        self.access, self.audit = Access(store, server, refresh_s=0.0), Audit(store)
        routes = [Route(path, whoami, methods=METHODS) for path in PATHS]
        routes += [Route("/v1/responses", streamed, methods=["POST"]), Route("/pause", broken, methods=["POST"])]
        self.app = AccessMiddleware(Starlette(routes=routes), self.access, self.audit)

    def client(self, key: str | None = None, peer: str = "203.0.113.9", **headers: str) -> httpx.AsyncClient:
        """A client at an address, with a key."""
        more = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.app, client=(peer, 1), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://noria", headers={**headers, **more})


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    """With a key in the settings, so that it asks."""
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        made = Guarded(store, ServerSettings(api_key="secret"))
        yield made
        await made.access.close()


async def test_probes_stay_open_and_all_else_asks(guarded: Guarded) -> None:
    async with guarded.client() as http:
        for path in ("/health", "/ping"):
            assert (await http.get(path)).json() == {"caller": "local", "wire": "http"}
        assert (await http.options("/v1/completions")).status_code == 200
        for path in ("/v1/models", "/sleep", "/noria/v1/status", "/no/such/route", "/metrics"):
            refused = await http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
    async with guarded.client("secret") as http:
        assert (await http.post("/v1/completions")).json()["caller"] == "settings"
        assert (await http.post("/v1/responses")).text == "settings"
        assert (await http.get("/no/such/route")).status_code == 404
    assert current_caller.get() is LOCAL
    assert guarded.access.refusals.unauthenticated == 5


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {}, 200),
        ("203.0.113.9", {}, 401),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, 401),
        ("127.0.0.1", {"forwarded": "for=203.0.113.9"}, 401),
        ("127.0.0.1", {"x-real-ip": "203.0.113.9"}, 401),
    ],
)
async def test_metrics_are_open_to_this_machine_alone(
    guarded: Guarded, peer: str, headers: dict[str, str], status: int
) -> None:
    async with guarded.client(None, peer, **headers) as http:
        assert (await http.get("/metrics")).status_code == status
        assert (await http.get("/v1/models")).status_code == 401
        for path in ("/metrics", "/metrics/", "/metricsx"):  # what serves them looks at no method
            assert (await http.options(path)).status_code == 401
    _, text = guarded.store.create_key("scraper", ["annotator"])
    async with guarded.client(text, peer, **headers) as http:
        assert (await http.get("/metrics")).status_code == 200


async def test_operators_calls_of_the_engine_are_written_down(guarded: Guarded) -> None:
    _, client = guarded.store.create_key("shop", ["client"])
    boss, operator = guarded.store.create_key("boss", ["operator"])
    async with guarded.client(client) as http:
        refused = await http.post("/sleep")
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert "needs the role operator; the key 'shop' has client" in refused.json()["error"]["message"]
        assert (await http.post("/v1/completions")).status_code == 200
    async with guarded.client(operator) as http:
        assert (await http.post("/sleep")).status_code == 200
        assert (await http.get("/sleep")).status_code == 200  # reads are not written down
        assert (await http.post("/sleep?status=409")).status_code == 409
        assert (await http.post("/pause")).status_code == 500
        await http.post("/noria/v1/status")  # Noria's own handlers write their own lines
        await http.post("/" + "x" * 1000)
    kept = guarded.store.list_audit_events(order="asc")
    assert [(one.key_id, one.action, one.target, one.result) for one in kept] == [
        (boss.id, "engine_call", "POST /sleep", "ok"),
        (boss.id, "engine_call", "POST /sleep", "http_409"),
        (boss.id, "engine_call", "POST /pause", "http_500"),
        (boss.id, "engine_call", ("POST /" + "x" * 1000)[:200], "http_404"),
    ]
    registry = CollectorRegistry()
    registry.register(AccessCollector(guarded.access, guarded.audit))
    scraped = generate_latest(registry).decode()
    assert 'noria_access_refused_total{reason="forbidden"} 1.0' in scraped
    assert "noria_audit_written_total 4.0" in scraped and "noria_audit_lost_total 0.0" in scraped


async def test_a_line_that_the_store_does_not_take_is_counted_and_the_answer_stands(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded.store._db.write() as conn:
        conn.exec_driver_sql("ALTER TABLE audit_events RENAME TO elsewhere")
    async with guarded.client("secret") as http:
        assert (await http.post("/sleep")).status_code == 200
    assert (guarded.audit.written, guarded.audit.lost) == (0, 1)
    (told,) = [record for record in caplog.records if record.name == "noria.audit"]
    assert (told.message, vars(told)["key_id"], vars(told)["action"]) == ("audit line lost", "settings", "engine_call")


async def test_a_websocket_without_a_key_is_closed(guarded: Guarded) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await guarded.app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "invalid_api_key"}]
