"""The server: one process, one event loop, in which vLLM answers and everything of Noria's runs beside it.

Comes in: settings, and perhaps the name of a model. Goes out: HTTP and gRPC until SIGTERM, then an exit code. The
environment must be set first (`serve.engine.environment`); `serve.__main__` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from noria.blobs import Blobs
from noria.errors import NoriaError
from noria.records import Json, ProcessInfo
from noria.registry import Registry
from noria.settings import ServerSettings, Settings
from noria.store import Store
from serve.access.audit import Audit
from serve.access.limits.judgements import CallerLimits
from serve.access.limits.metrics import limits_over
from serve.access.start import access_over, said_of_keys
from serve.api.chat import VllmChatBackend
from serve.api.errors import error_response
from serve.api.grpc.health import Health
from serve.api.grpc.server import build_server
from serve.api.handlers import Handlers
from serve.api.http import build_router
from serve.api.openai.stored import build_stored_router
from serve.capture.metrics import export_capture
from serve.capture.queue import CaptureQueue
from serve.doors import Doors, bind_http
from serve.engine.launch import build_application, engine_flags, parse_flags, start_engine
from serve.engine.middleware import TraceMiddleware
from serve.engine.versions import VersionGate
from serve.front import Front
from serve.input.refusals import Refusals, export_refusals
from serve.live import choose_version
from serve.privacy.keeper import Keeper
from serve.privacy.metrics import exported_privacy
from serve.privacy.scrub import Scrubber
from serve.release.releaser import Releaser
from serve.sampling.http import build_sampling_router
from serve.sampling.service import Sampling
from serve.sampling.start import sampling_over
from serve.tls import Certificates, certificates_of

logger = logging.getLogger("noria.server")
BEAT_S = 2.0


async def run(settings: Settings, model: str | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after an orderly end, 1 when the engine died.

    Raises NoriaError where there is no model, a port is taken, or the engine does not start.
    """
    stop = Stop()
    async with AsyncExitStack() as stack:
        certificates = await stack.enter_async_context(certified(settings.server))
        sock = bind_http(settings.server)
        stack.callback(sock.close)
        store = await asyncio.to_thread(Store.open, settings.store_url)
        stack.callback(store.close)
        audit = Audit(store)
        access = await stack.enter_async_context(access_over(store, settings.server, audit))
        registry, blobs = Registry(settings.models_dir, store), Blobs(settings.blobs_url)
        scrubber, keeper = Scrubber(settings.privacy), Keeper(store, blobs, settings.privacy)
        gate = VersionGate(await asyncio.to_thread(choose_version, registry, model))
        capture = await stack.enter_async_context(_capture(store, blobs, settings, scrubber))
        stack.enter_context(exported_privacy(scrubber, keeper))
        args = parse_flags(engine_flags(settings, gate.current.path, gate.current.id))
        engine = await stack.enter_async_context(running_engine(args, settings))
        limits = await stack.enter_async_context(limits_over(settings.limits, sequences_of(engine), store))
        refusals = stack.enter_context(counted_refusals())
        app = await build_application(engine, args, gate, capture, settings, refusals)
        sampling = await stack.enter_async_context(sampling_over(engine, app.state, gate, settings, audit))
        handlers = Handlers(
            store=store,
            registry=registry,
            blobs=blobs,
            gate=gate,
            capture=capture,
            settings=settings,
            audit=audit,
            limits=CallerLimits(limits, store),
            scrubber=scrubber,
            kept=keeper.told,
        )
        stored = build_stored_router(store, blobs, capture, audit, scrubber)
        add_routers(app, stored, build_sampling_router(sampling), build_router(handlers))
        front = Front(access, audit, limits, refusals, settings.input, settings.doors)
        doors, grpc_port = await _doors(app, gate, handlers, sampling, front, sock, certificates)
        stop.on_second(doors.force)
        stack.push_async_callback(doors.close)
        stack.push_async_callback(sampling.close)  # before the doors: a group would hold them open
        releaser = Releaser(engine, gate, store, registry, settings, before_swap=sampling.forget_adapters)
        await stack.enter_async_context(background(releaser.run(), "release", before_end=_opened(gate, settings)))
        await doors.open()
        info = addresses(settings.server, sock.getsockname()[1], grpc_port)
        announcement = Announcement(settings.home, store, gate, capture, info)
        stack.callback(announcement.withdraw)
        await stack.enter_async_context(background(announcement.keep(), "heartbeat"))
        await stack.enter_async_context(background(keeper.run(), "retention"))
        await stack.enter_async_context(background(watch(engine, gate, stop), "watch"))
        print(f"noria: serving {gate.current.id} on {info['url']} and grpc {info['grpc']}", flush=True)
        if note := said_of_keys(access, settings.server):
            print(f"noria: {note}", flush=True)
        await stop.asked.wait()
    return stop.code


class Stop:
    """Why and when the server ends."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.code = 0
        self._second: Any = None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def on_second(self, action: Any) -> None:
        """What a second signal does."""
        self._second = action

    def fail(self) -> None:
        """Ends the server with exit code 1."""
        self.code = 1
        self.asked.set()

    def _signalled(self) -> None:
        if self.asked.is_set() and self._second is not None:
            self._second()
        self.asked.set()


class Announcement:
    """Tells where the server is: `server.json` in the home for scripts, a heartbeat in the store for the rest."""

    def __init__(self, home: Path, store: Store, gate: VersionGate, capture: CaptureQueue, info: Json) -> None:
        self._path = home / "server.json"
        self._store, self._gate, self._capture = store, gate, capture
        self._info = {**info, "pid": os.getpid()}
        self._id = f"server-{os.uname().nodename}-{os.getpid()}"
        self._written: Json = {}

    async def keep(self) -> None:
        """Writes both again and again; a store that does not answer is logged and tried later."""
        while True:
            try:
                await asyncio.to_thread(self._tell)
            except Exception as error:  # the heartbeat of a server that answers must not end it
                logger.warning("heartbeat failed", extra={"reason": type(error).__name__}, exc_info=error)
            await asyncio.sleep(BEAT_S)

    def withdraw(self) -> None:
        """Removes `server.json`, if it is still ours."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self._path.read_text())["pid"] == self._info["pid"]:
                self._path.unlink()

    def _tell(self) -> None:
        told = {**self._info, "version": self._gate.current.id}
        if told != self._written:
            beside = self._path.with_suffix(".tmp")
            beside.write_text(json.dumps(told))
            beside.replace(self._path)
            self._written = told
        counts = self._capture.counts
        info = {
            **self._info,
            "serving": self._gate.current.id,
            "in_flight": self._gate.in_flight,
            "capture": {"sent": counts.sent, "stored": counts.stored, "dropped": counts.dropped},
        }
        self._store.beat(ProcessInfo(self._id, "server", time.time(), info))


@asynccontextmanager
async def _capture(store: Store, blobs: Blobs, settings: Settings, scrubber: Scrubber) -> AsyncIterator[CaptureQueue]:
    from prometheus_client import REGISTRY

    capture = CaptureQueue(store, blobs, settings.capture, scrubber.completion)
    collector = export_capture(capture)
    try:
        yield capture
    finally:
        REGISTRY.unregister(collector)
        await capture.close()
        counts = capture.counts
        logger.info("capture closed", extra={"sent": counts.sent, "stored": counts.stored, "dropped": counts.dropped})


@asynccontextmanager
async def certified(server: ServerSettings) -> AsyncIterator[Certificates | None]:
    """The certificates, looked after for as long as the block runs; None without TLS. Raises SettingsError."""
    from prometheus_client import REGISTRY

    found = certificates_of(server.tls)
    if found is None:
        yield None
        return
    REGISTRY.register(found)
    try:
        async with background(found.keep(), "certificates"):
            yield found
    finally:
        REGISTRY.unregister(found)


def addresses(server: ServerSettings, http_port: int, grpc_port: int | None = None) -> Json:
    """`url`, and `grpc` where it listens: where clients on this machine find the two wires."""
    found = {"url": server.url_here(http_port)}
    return found if grpc_port is None else {**found, "grpc": f"{server.host_here()}:{grpc_port}"}


@asynccontextmanager
async def running_engine(args: Namespace, settings: Settings) -> AsyncIterator[Any]:
    """vLLM's engine for as long as the block runs. Raises NoriaError when it does not start."""
    engine = start_engine(args, fast=settings.engine.fast_start)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.shutdown, timeout=5.0)


@asynccontextmanager
async def background(work: Any, name: str, before_end: Any = None) -> AsyncIterator[None]:
    """Runs `work` beside the rest; at the end waits for `before_end`, then cancels it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    try:
        yield
    finally:
        if before_end is not None:
            await before_end
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("background task ended", extra={"task": task.get_name()}, exc_info=task.exception())


async def _opened(gate: VersionGate, settings: Settings) -> None:
    """Waits while a swap has the gate closed: cut in the middle, it would leave those who queue without an engine."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(gate.opened(), settings.server.shutdown_s)


async def watch(engine: Any, gate: VersionGate, stop: Stop) -> None:
    """Ends the server when its engine is dead or holds no whole version: its supervisor starts it again."""
    while not (engine.errored or gate.failed):  # noqa: ASYNC110  vLLM has no event for it
        await asyncio.sleep(0.5)
    logger.error("the engine cannot answer any more")
    stop.fail()


def answer_error(_request: Any, error: NoriaError) -> Any:
    """What the gate refuses inside vLLM's own routes, in OpenAI's shape."""
    return error_response(error)


def sequences_of(engine: Any) -> int:
    """How many sequences the engine runs at once."""
    return int(engine.vllm_config.scheduler_config.max_num_seqs)


def add_routers(app: Any, *routers: Any) -> None:
    """Puts our routes beside vLLM's, and has its own routes answer our errors as ours do."""
    app.add_exception_handler(NoriaError, answer_error)
    app.middleware_stack = app.build_middleware_stack()  # vLLM built it before: without this the handler is unread
    for router in routers:
        app.include_router(router)


async def _doors(
    app: Any,
    gate: VersionGate,
    handlers: Handlers,
    sampling: Sampling,
    front: Front,
    sock: socket.socket,
    certificates: Certificates | None,
) -> tuple[Doors, int]:
    """Both doors behind the front, still closed, and the port of gRPC's."""
    server, health = handlers.settings.server, Health()
    gate.on_failure(health.engine_lost)
    grpc_server, grpc_port = await build_server(
        handlers,
        VllmChatBackend(app.state, gate),
        sampling,
        front.interceptors(),
        host=server.host,
        port=server.grpc_port,
        health=health,
        credentials=certificates.credentials() if certificates else None,
    )
    doors = Doors(
        front.over(TraceMiddleware(app, gate)),
        app.state,
        sock,
        grpc_server,
        server.shutdown_s,
        handlers.settings.doors,
        tls=certificates.context if certificates else None,
        before_close=health.close,
    )
    return doors, grpc_port


@contextlib.contextmanager
def counted_refusals() -> Iterator[Refusals]:
    """The counters of refused input, on `/metrics` for as long as the block runs."""
    from prometheus_client import REGISTRY

    refusals = export_refusals(Refusals())
    try:
        yield refusals
    finally:
        REGISTRY.unregister(refusals)
