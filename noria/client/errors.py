"""Answers that are errors, and no answer at all, as NoriaErrors.

Comes in: an HTTP status and body, or httpx's error. Goes out: JSON, or a NoriaError.
"""

from __future__ import annotations

from typing import Any

import httpx

from noria.errors import WIRE, NoriaError, SettingsError, Unavailable
from noria.records import Json


def json_or_raise(response: httpx.Response) -> Json:
    """The body, which has been read. Raises the NoriaError that it tells of."""
    try:
        body = response.json() if response.content else {}
    except ValueError:
        body = {}
    if response.is_error:
        raise error_of(response.status_code, body, response.headers.get("retry-after"))
    if not isinstance(body, dict) or (not body and response.content):
        raise Unavailable(f"{response.request.url} answered {response.status_code} without JSON: is it a Noria server?")
    return body


def unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    """Nobody answers at the URL, and what to do."""
    what = "took too long" if isinstance(error, httpx.TimeoutException) else "does not answer"
    advice = "start it with `noria up`, or say where it is with --url or NORIA_URL"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        what, advice = "is not trusted", "name its authority with NORIA_TLS_CA, and the URL as its certificate has it"
    return Unavailable(f"the server at {url} {what} ({error or type(error).__name__}); {advice}")


def error_of(status: int, body: Any, retry_after: str | None = None) -> NoriaError:
    """The NoriaError that an error body tells of: by its `type` in the table, else by the HTTP status.

    `retry_after` is the header's text; a date in it (RFC 9110 allows one, Noria sends none) is left out.
    """
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"the server answered {status}")
    code, param = said.get("code"), said.get("param")
    rows = [cls for cls, wire in WIRE.items() if wire.openai_type == said.get("type")]
    rows = rows or [cls for cls, wire in WIRE.items() if wire.http_status == status]
    rows = rows or [Unavailable if status in (502, 504) else NoriaError]
    # Two classes may share a row's words: the code tells them apart. Without one, settings are the least likely.
    rows.sort(key=lambda cls: (cls.code != code, cls is SettingsError))
    wait_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    return rows[0](message, param=param, code=str(code) if code else None, retry_after_s=wait_s)
