"""Everything of a server but vLLM: store, blobs, gate, capture, handlers, front door and both wires are the real ones.

Comes in: a home and settings. Goes out: two free ports, served by one event loop in a thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from noria.blobs import Blobs
from noria.errors import NoriaError
from noria.records import Json
from noria.registry import ManifestDraft, Registry, fingerprint
from noria.settings import DoorSettings, Settings
from noria.store import Store
from serve.access.keys import Access
from serve.access.limits.judgements import CallerLimits
from serve.access.limits.limits import Limits
from serve.api.errors import error_response
from serve.api.grpc.health import Health
from serve.api.grpc.server import build_server
from serve.api.handlers import Handlers
from serve.api.http import body_of, build_router
from serve.api.openai.stored import build_stored_router
from serve.capture.queue import CaptureQueue
from serve.engine.middleware import TraceMiddleware
from serve.engine.versions import ServingVersion, VersionGate
from serve.front import Front
from serve.input.fetch.fetcher import Fetcher
from serve.input.media import MediaDoor
from serve.input.refusals import Refusals
from serve.privacy.scrub import Scrubber
from serve.sampling.adapters.shelf import AdapterShelf
from serve.sampling.http import build_sampling_router
from serve.sampling.service import Sampling
from serve.sampling.turns import Turns
from serve.tls import Https, certificates_of
from serve.wires.patience import Reason, patient
from tests.contract.fake_engine import FakeChat, parsed, server_sent
from tests.contract.fake_sampling import FakeSamplingEngine
from tests.unit.sampling.adapters import write_serving


def chat_app(chat: FakeChat, routers: Sequence[APIRouter], gate: VersionGate, front: Front) -> Any:
    """The application: `/v1/chat/completions` over the fake, and our own routers."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def create(request: Request) -> Response:
        try:
            body = parsed(await body_of(request))
            if body.stream:
                await chat.look(body.messages)  # a stream's head is out before its first chunk is made
                return StreamingResponse(server_sent(chat.chunks(body)), media_type="text/event-stream")
            return JSONResponse(await chat.answer(body))
        except NoriaError as error:
            return error_response(error)

    for router in routers:
        app.include_router(router)
    return front.over(TraceMiddleware(app, gate))


class HttpsServer(Https, uvicorn.Server):
    """What `serve.doors` makes of vLLM's server."""


class FakeSystem:
    """Everything of a server but vLLM, listening on two free ports.

    `adapters` is `engine.policy_adapters`; `server`, `limits` and `input` are (more of) the settings' sections;
    `fetching` is how the `Fetcher` resolves and dials. Its engine runs four sequences; the limits' clocks are
    `monotonic_ns` and `wall`.
    """

    def __init__(
        self,
        home: Path,
        api_key: str | None = None,
        adapters: int = 2,
        *,
        server: Json | None = None,
        limits: Json | None = None,
        input: Json | None = None,
        doors: DoorSettings | None = None,
        **fetching: Any,
    ) -> None:
        self.home = home
        self.monotonic_ns: Callable[[], int] = time.monotonic_ns
        self.wall: Callable[[], float] = time.time
        self.limits: Limits
        keyed = {"api_key": api_key} if api_key else {}
        sections = {"server": {**keyed, **(server or {})}, "limits": limits or {}, "input": input or {}}
        sections |= {"doors": doors.model_dump() if doors else {}}
        self._settings = Settings.model_validate({"home": home, **sections})
        self.certificates = certificates_of(self._settings.server.tls)
        self.health: Health
        self.refusals = Refusals()
        self.ended: Counter[Reason] = Counter()
        images = self._settings.input.images
        self._door = MediaDoor(images, self.refusals, Fetcher(images, **fetching))
        home.mkdir(parents=True, exist_ok=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.http_port = self.grpc_port = 0
        self.chat: FakeChat
        self.gate: VersionGate
        self.sampling: Sampling
        self.engine = FakeSamplingEngine()
        self._adapters = adapters

    def start(self) -> None:
        """Returns when both doors are open."""
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the fake system did not start")

    def stop(self) -> None:
        """Closes both doors and what is behind them."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)
            if self._thread.is_alive():
                raise RuntimeError("the fake system did not end")

    def on_loop(self, call: Callable[[], Any]) -> Any:
        """What the call gives, made on the event loop; a coroutine's result."""

        async def made() -> Any:
            found = call()
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(made(), self._loop).result(30)

    def swap(self, version: ServingVersion) -> None:
        """Has another version serve, in the releaser's order."""

        async def change() -> None:
            async with self.gate.exclusive(10):
                await self.sampling.forget_adapters()
                self.gate.set_current(version)

        self.on_loop(change)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with Store.open(self._settings.store_url, clock=lambda: self.wall()) as store:
            registry = Registry(self._settings.models_dir, store)
            version = _first_version(registry)
            gate = self.gate = VersionGate(version)
            blobs = Blobs(self._settings.blobs_url)
            scrubber = Scrubber(self._settings.privacy)
            capture = CaptureQueue(store, blobs, self._settings.capture, scrubber.completion)
            limits = self.limits = Limits(
                self._settings.limits, 4, store, clock_ns=lambda: self.monotonic_ns(), wall=lambda: self.wall()
            )
            await limits.tokens.load()
            handlers = Handlers(
                store=store,
                registry=registry,
                blobs=blobs,
                gate=gate,
                capture=capture,
                settings=self._settings,
                limits=CallerLimits(limits, store),
                scrubber=scrubber,
            )
            self.chat = FakeChat(gate, capture, self._door)
            shelf = AdapterShelf(self.engine, gate, self.home / "adapters", most=self._adapters, max_rank=8)
            audit = handlers.audit
            sampling = self.sampling = Sampling(self.engine, gate, shelf, Turns(4, 1, quiet_s=0.01), audit)
            access = Access(store, self._settings.server, refresh_s=0.05)
            stored = build_stored_router(store, blobs, capture, audit, scrubber)
            routers = (stored, build_sampling_router(sampling), build_router(handlers))
            keeping = asyncio.create_task(sampling.keep())
            self.health, tls = Health(), self.certificates
            gate.on_failure(self.health.engine_lost)
            front = Front(access, audit, limits, self.refusals, self._settings.input, self._settings.doors)
            rpc, self.grpc_port = await build_server(
                handlers,
                self.chat,
                sampling,
                front.interceptors(),
                host="127.0.0.1",
                port=0,
                health=self.health,
                credentials=tls and tls.credentials(),
            )
            await rpc.start()
            await self._serve_http(chat_app(self.chat, routers, gate, front))
            keeping.cancel()
            await sampling.close()
            await self.health.close()
            await rpc.stop(1)
            await access.close()
            await capture.close()
            await limits.tokens.write()

    async def _serve_http(self, app: Any) -> None:
        tls = self.certificates
        config = uvicorn.Config(
            app,
            http=patient(self._settings.doors, self.ended),
            port=0,
            log_level="warning",
            lifespan="off",
            ssl_context_factory=(lambda *_: tls.context) if tls else None,
        )
        http = HttpsServer(config) if tls else uvicorn.Server(config)
        listening = config.bind_socket()
        listening.listen()
        self.http_port = listening.getsockname()[1]
        task = asyncio.create_task(http.serve(sockets=[listening]))
        self._ready.set()
        await self._stop.wait()
        http.should_exit = True
        await task


def _first_version(registry: Registry) -> ServingVersion:
    staging = registry.begin("fake")
    write_serving(staging / "serving")
    frozen = {"vision_tower": "sha256:00", "aligner": "sha256:01"}
    manifest = registry.publish(staging, ManifestDraft(method="base", metrics={"kl": 0.25}, frozen=frozen))
    registry.promote(manifest.id)
    return ServingVersion(manifest.id, fingerprint(manifest), registry.path(manifest.id) / "serving")
