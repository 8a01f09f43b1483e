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

from noria.errors import NoriaError
from noria.records import Json
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from serve.doors import Doors, bind_http
from serve.engine.launch import build_application, engine_flags, parse_flags
from serve.engine.versions import ServingVersion, VersionGate
from serve.live import version_aside
from serve.process import Stop, answer_error, background, key_of, reachable, running_engine, watch, wrapped
from serve.sampling.http import build_sampling_router
from serve.sampling.start import sampling_over


async def run_aside(settings: Settings, version: str | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 after an orderly end, 1 when the engine died.

    Raises NoriaError where there is no such version, the port is taken, or the engine does not start.
    """
    stop = Stop()
    async with AsyncExitStack() as stack:
        sock = bind_http(settings.server)
        stack.callback(sock.close)
        gate = VersionGate(await asyncio.to_thread(_chosen, settings, version))
        args = parse_flags(engine_flags(settings, gate.current.path, gate.current.id))
        engine = await stack.enter_async_context(running_engine(args, settings))
        app = await build_application(engine, args, gate, None, settings)
        sampling = await stack.enter_async_context(sampling_over(engine, app.state, gate, settings))
        app.add_exception_handler(NoriaError, answer_error)
        app.include_router(build_sampling_router(sampling, key_of(settings)))
        doors = Doors(wrapped(app, gate, settings), app.state, sock, None, settings.server.shutdown_s, settings.doors)
        stop.on_second(doors.force)
        stack.push_async_callback(doors.close)
        stack.push_async_callback(sampling.close)
        await doors.open()
        url = f"http://{reachable(settings.server.host)}:{sock.getsockname()[1]}"
        stack.enter_context(_told(settings, {"url": url, "pid": os.getpid(), "version": gate.current.id}))
        await stack.enter_async_context(background(watch(engine, gate, stop), "watch"))
        print(f"noria: serving {gate.current.id} aside on {url}", flush=True)
        await stop.asked.wait()
    return stop.code


def _chosen(settings: Settings, version: str | None) -> ServingVersion:
    with Store.open(settings.store_url) as store:
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
