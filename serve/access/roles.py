"""The one table of who may call what: HTTP routes and gRPC methods by role.

Comes in: a method and a path, or the full name of a gRPC method. Goes out: the roles of which one is enough.
What no row names needs `operator`: a route that a later vLLM brings is closed until somebody opens it here.
Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from noria.access.keys import ROLES, Role

Roles = frozenset[Role]

OPERATOR: Roles = frozenset({"operator"})
CLIENT: Roles = frozenset({"client"})
STORED: Roles = frozenset({"client", "operator"})  # a client's own; see `serve.api.openai.stored`
READ: Roles = frozenset({"client", "annotator", "operator"})
JUDGE: Roles = frozenset({"annotator", "operator"})
SAMPLE: Roles = frozenset({"trainer", "operator"})
ANY: Roles = frozenset(ROLES)

OPEN_PATHS = frozenset({"/health", "/ping", "/live"})  # what a probe asks without a key
METRICS = "/metrics"  # what answers there answers every method, and every path that begins so
METRICS_PATHS = frozenset({"/metrics", "/metrics/"})  # what a scraper on this machine asks without a key
OPEN_METHODS = ("/grpc.health.v1.Health/",)


@dataclass(frozen=True)
class Row:
    """One route. `{}` in the path is one segment of it; `WEBSOCKET` stands among the methods."""

    methods: str
    path: str
    roles: Roles


_INFERENCE = (
    "/v1/chat/completions /v1/chat/completions/batch /v1/chat/completions/render /v1/chat/completions/derender "
    "/v1/completions /v1/completions/render /v1/completions/derender /v1/responses /v1/responses/render "
    "/v1/responses/{}/cancel /v1/messages /v1/messages/render /v1/messages/count_tokens /cohere/v2/chat /invocations "
    "/v1/embeddings /v2/embed /pooling /classify /score /v1/score /rerank /v1/rerank /v2/rerank /generative_scoring "
    "/v1/audio/transcriptions /v1/audio/translations /tokenize /detokenize"
)

HTTP: tuple[Row, ...] = (
    *(Row("POST", path, CLIENT) for path in _INFERENCE.split()),
    Row("GET", "/v1/responses/{}", CLIENT),
    Row("WEBSOCKET", "/v1/realtime", CLIENT),
    Row("GET", "/v1/models", ANY),
    Row("GET", "/version", ANY),
    Row("GET", "/metrics", ANY),
    Row("GET", "/metrics/", ANY),
    Row("GET", "/v1/chat/completions", READ),
    Row("GET", "/v1/chat/completions/{}", READ),
    Row("GET", "/v1/chat/completions/{}/messages", READ),
    Row("POST DELETE", "/v1/chat/completions/{}", STORED),
    Row("GET POST", "/noria/v1/preferences", JUDGE),
    Row("GET", "/noria/v1/preferences/{}", JUDGE),
    Row("GET POST", "/noria/v1/feedback", JUDGE),
    Row("GET", "/noria/v1/limits", ANY),
    Row("GET", "/noria/v1/adapters", SAMPLE),
    Row("PUT DELETE", "/noria/v1/adapters/{}", SAMPLE),
    Row("POST", "/noria/v1/samples", SAMPLE),
)

_REFLECTION = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"

GRPC: dict[str, Roles] = {
    "/noria.v1.InferenceService/CreateChatCompletion": CLIENT,
    "/noria.v1.InferenceService/StreamChatCompletion": CLIENT,
    "/noria.v1.FeedbackService/RecordPreference": JUDGE,
    "/noria.v1.FeedbackService/ListPreferences": JUDGE,
    "/noria.v1.FeedbackService/RecordFeedback": JUDGE,
    "/noria.v1.FeedbackService/ListFeedback": JUDGE,
    "/noria.v1.SamplingService/PutAdapter": SAMPLE,
    "/noria.v1.SamplingService/DeleteAdapter": SAMPLE,
    "/noria.v1.SamplingService/ListAdapters": SAMPLE,
    "/noria.v1.SamplingService/SampleGroup": SAMPLE,
    _REFLECTION.format("v1alpha"): ANY,
    _REFLECTION.format("v1"): ANY,
}


def http_roles(method: str, path: str) -> Roles:
    """Who may call it; a HEAD is its GET. Where a path fits several rows (an id may be called `batch`), the exact."""
    method = "GET" if method == "HEAD" else method
    exact, patterns = _tables()
    found = exact.get((method, path))
    if found is not None:
        return found
    return next((roles for methods, pattern, roles in patterns if method in methods and pattern(path)), OPERATOR)


def grpc_roles(method: str) -> Roles:
    """Who may call a method, by its full name: `/noria.v1.OperatorService/Retrain`."""
    return GRPC.get(method, OPERATOR)


Exact = dict[tuple[str, str], Roles]
Patterns = list[tuple[list[str], Callable[[str], object], Roles]]


@cache
def _tables() -> tuple[Exact, Patterns]:
    """The rows for a quick look: those with a path of their own, and the others in order."""
    exact: Exact = {}
    patterns: Patterns = []
    for row in HTTP:
        methods = row.methods.split()
        if "{}" in row.path:
            fits = re.compile(re.escape(row.path).replace(re.escape("{}"), "[^/]+")).fullmatch
            patterns.append((methods, fits, row.roles))
        else:
            exact |= {(method, row.path): row.roles for method in methods}
    return exact, patterns
