"""The front door: who calls, how much, and what comes in, checked in one order on both wires.

Comes in: the parts that check. Goes out: an ASGI application behind them, and gRPC's interceptors.
Must not import vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from noria.settings import DoorSettings, InputSettings
from serve.access.audit import Audit
from serve.access.guards.grpc import AccessInterceptor
from serve.access.guards.http import AccessMiddleware
from serve.access.keys import Access
from serve.access.limits.grpc import LimitsInterceptor
from serve.access.limits.http import LimitsMiddleware
from serve.access.limits.limits import Limits
from serve.input.grpc import InputInterceptor
from serve.input.http import InputMiddleware
from serve.input.refusals import Refusals


@dataclass(frozen=True)
class Front:
    """The key first, which costs nothing to look at; then its limits, before a body is read; the body last."""

    access: Access
    audit: Audit
    limits: Limits
    refusals: Refusals
    input: InputSettings
    doors: DoorSettings

    def over(self, app: Any) -> Any:
        """The ASGI application behind the checks."""
        checked = InputMiddleware(app, self.input, self.refusals)
        return AccessMiddleware(LimitsMiddleware(checked, self.limits), self.access, self.audit)

    def interceptors(self) -> list[Any]:
        """The same for grpc.aio, outermost first."""
        checks = InputInterceptor(self.input, self.refusals)
        return [AccessInterceptor(self.access, self.doors), LimitsInterceptor(self.limits), checks]
