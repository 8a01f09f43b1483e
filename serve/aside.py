"""A server beside the home's own: one version answers, and nothing in the home changes.

Comes in: settings and the id of a version. Goes out: vLLM's routes over HTTP until SIGTERM, then an exit code. It makes
nothing live, runs no rollouts, captures nothing, has only sampling of `/noria/v1`, and is not the server that the
home's commands find. Where it answers stands in `aside-PID.json` in the home while it does.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from noria.records import Json
from noria.registry import Registry
from noria.settings import ServerSettings, Settings, TlsSettings
from noria.store import Store
from serve.access.audit import Audit
from serve.access.limits.metrics import limits_over
from serve.access.start import access_over, said_of_keys
from serve.doors import Doors, bind_http
from serve.engine.launch import build_application, engine_flags, parse_flags
from serve.engine.middleware import TraceMiddleware
from serve.engine.versions import ServingVersion, VersionGate
from serve.front import Front
from serve.live import version_aside
from serve.process import (
    Stop,
    add_routers,
    addresses,
    background,
    certified,
    counted_refusals,
    running_engine,
    sequences_of,
    watch,
)
from serve.sampling.http import build_sampling_router
from serve.sampling.start import sampling_over

LOOPBACK = ("127.0.0.1", "localhost", "::1")


async def run_aside(settings: Settings, version: str | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after an orderly end, 1 when the engine died.

    Raises NoriaError where there is no such version, the port is taken, or the engine does not start.
    """
    stop = Stop()
    async with AsyncExitStack() as stack:
        server = aside_settings(settings.server)
        certificates = await stack.enter_async_context(certified(server))
        sock = bind_http(server)
        stack.callback(sock.close)
        store = await asyncio.to_thread(Store.open, settings.store_url)
        stack.callback(store.close)
        audit = Audit(store)
        access = await stack.enter_async_context(access_over(store, settings.server, audit))
        gate = VersionGate(await asyncio.to_thread(_chosen, settings, store, version))
        args = parse_flags(engine_flags(settings, gate.current.path, gate.current.id))
        engine = await stack.enter_async_context(running_engine(args, settings))
        limits = await stack.enter_async_context(limits_over(settings.limits, sequences_of(engine)))
        refusals = stack.enter_context(counted_refusals())
        app = await build_application(engine, args, gate, None, settings, refusals)
        sampling = await stack.enter_async_context(sampling_over(engine, app.state, gate, settings, audit))
        add_routers(app, build_sampling_router(sampling))
        front = Front(access, audit, limits, refusals, settings.input, settings.doors)
        tls = certificates.context if certificates else None
        behind = front.over(TraceMiddleware(app, gate))
        doors = Doors(behind, app.state, sock, None, server.shutdown_s, settings.doors, tls=tls)
        stop.on_second(doors.force)
        stack.push_async_callback(doors.close)
        stack.push_async_callback(sampling.close)
        await doors.open()
        url = addresses(server, sock.getsockname()[1])["url"]
        stack.enter_context(_told(settings, {"url": url, "pid": os.getpid(), "version": gate.current.id}))
        await stack.enter_async_context(background(watch(engine, gate, stop), "watch"))
        print(f"noria: serving {gate.current.id} aside on {url}", flush=True)
        if note := said_of_keys(access, settings.server):
            print(f"noria: {note}", flush=True)
        await stop.asked.wait()
    return stop.code


def aside_settings(server: ServerSettings) -> ServerSettings:
    """The server's settings; a server that only this machine reaches (`noria eval` starts one) speaks no TLS, for which
    no certificate would be in its name."""
    return server.model_copy(update={"tls": TlsSettings()}) if server.host in LOOPBACK else server


def _chosen(settings: Settings, store: Store, version: str | None) -> ServingVersion:
    return version_aside(Registry(settings.models_dir, store), version)


@contextmanager
def _told(settings: Settings, info: Json) -> Iterator[None]:
    path = settings.home / f"aside-{os.getpid()}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(info))
    beside.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
