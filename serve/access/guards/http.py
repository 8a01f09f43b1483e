"""The HTTP door: who is calling, and whether their key's roles allow the call.

Comes in and goes out: ASGI messages. Pure ASGI, so that streams pass untouched. Must not import vllm.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from noria.access.audit import OK
from noria.access.loopback import is_loopback
from noria.errors import NoriaError, Unauthenticated
from serve.access.audit import Audit
from serve.access.caller import current_caller, current_wire
from serve.access.keys import Access
from serve.access.roles import METRICS, METRICS_PATHS, OPEN_PATHS, OPERATOR, Roles, http_roles
from serve.api.errors import error_response

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
READS = ("GET", "HEAD")


class AccessMiddleware:
    """Lets a call in as its caller, or answers 401, 403 or 503 in OpenAI's shape.

    Probes stay open; metrics too, for a scraper on this machine that no proxy stands before. An operator's call of a
    route of vLLM's own is written to the audit log here; Noria's own routes write their own lines.
    """

    def __init__(self, app: ASGIApp, access: Access, audit: Audit) -> None:
        self.app = app
        self._access = access
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on with its caller current, or refuses it."""
        kind = scope["type"]
        if kind not in ("http", "websocket") or (kind == "http" and _is_open(scope)):
            await self.app(scope, receive, send)
            return
        method = scope["method"] if kind == "http" else "WEBSOCKET"
        roles = http_roles(method, scope["path"])
        try:
            caller = await self._access.admit(Headers(scope=scope).get("authorization"), roles)
        except NoriaError as error:
            await _refuse(error, scope, receive, send)
            return
        tokens = current_caller.set(caller), current_wire.set("http")
        try:
            if _is_vllms(method, scope["path"], roles):
                await self._audited(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            current_caller.reset(tokens[0])
            current_wire.reset(tokens[1])

    async def _audited(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            result = OK if status < 400 else f"http_{status}"
            await self._audit.note("engine_call", f"{scope['method']} {scope['path']}", result)


def _is_vllms(method: str, path: str, roles: Roles) -> bool:
    """Whether it may change something and none of Noria's handlers writes it down."""
    return roles == OPERATOR and method not in (*READS, "OPTIONS", "WEBSOCKET") and not path.startswith("/noria/")


def _is_open(scope: Scope) -> bool:
    if scope["path"] in OPEN_PATHS or (scope["method"] == "OPTIONS" and not scope["path"].startswith(METRICS)):
        return True
    return scope["path"] in METRICS_PATHS and scope["method"] in READS and _is_beside_us(scope)


def _is_beside_us(scope: Scope) -> bool:
    """Whether the caller is a process of this machine, and not a proxy that brings somebody else's call."""
    headers, client = Headers(scope=scope), scope.get("client")
    if client is None or any(name in headers for name in FORWARDED):
        return False
    return is_loopback(client[0])


async def _refuse(error: NoriaError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    answer = error_response(error)
    if isinstance(error, Unauthenticated):
        answer.headers["www-authenticate"] = "Bearer"
    await answer(scope, receive, send)
