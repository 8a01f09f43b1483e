"""What the table of roles says of each route of an application."""

from __future__ import annotations

import re
from typing import Any

from serve.access.roles import http_roles


def roles_by_route(app: Any) -> dict[tuple[str, ...], list[str]]:
    """`("GET", "/noria/v1/jobs/{job_id}")` to the roles of a path like it; HEAD is left out."""
    found: dict[tuple[str, ...], list[str]] = {}
    for route in app.routes:
        example = re.sub(r"\{\w+:path\}", "a/b", route.path)
        example = re.sub(r"\{\w+\}", "x1", example)
        for method in sorted((getattr(route, "methods", None) or {"GET"}) - {"HEAD"}):
            found[method, route.path] = sorted(http_roles(method, example))
    return found
