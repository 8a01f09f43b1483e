"""The table of roles, held against every route of Noria's own and every method of the protos, by an explicit list.

vLLM's routes are held against it in tests/flow/test_access.py.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from fastapi import FastAPI

from noria.v1 import feedback_pb2, inference_pb2, operator_pb2, sampling_pb2
from serve.access.roles import GRPC, HTTP, OPERATOR, grpc_roles, http_roles
from serve.api.http import build_router
from serve.api.openai.stored import build_stored_router
from serve.sampling.http import build_sampling_router
from tests.unit.access.routes import roles_by_route

OWN = """
GET    /v1/chat/completions                          annotator client operator
GET    /v1/chat/completions/{completion_id}          annotator client operator
POST   /v1/chat/completions/{completion_id}          client operator
DELETE /v1/chat/completions/{completion_id}          client operator
GET    /v1/chat/completions/{completion_id}/messages annotator client operator
PUT    /noria/v1/adapters/{name}                     operator trainer
GET    /noria/v1/adapters                            operator trainer
GET    /noria/v1/limits                              annotator client operator trainer
DELETE /noria/v1/adapters/{name}                     operator trainer
POST   /noria/v1/samples                             operator trainer
POST   /noria/v1/preferences                         annotator operator
GET    /noria/v1/preferences                         annotator operator
GET    /noria/v1/preferences/{preference_id}         annotator operator
DELETE /noria/v1/preferences/{preference_id}         operator
POST   /noria/v1/feedback                            annotator operator
GET    /noria/v1/feedback                            annotator operator
DELETE /noria/v1/feedback/{feedback_id}              operator
DELETE /noria/v1/end_users/{user:path}               operator
POST   /noria/v1/jobs                                operator
GET    /noria/v1/jobs                                operator
GET    /noria/v1/jobs/{job_id}                       operator
POST   /noria/v1/jobs/{job_id}/cancel                operator
GET    /noria/v1/jobs/{job_id}/events                operator
GET    /noria/v1/versions                            operator
GET    /noria/v1/versions/{version_id}               operator
POST   /noria/v1/rollouts                            operator
GET    /noria/v1/rollouts                            operator
GET    /noria/v1/rollouts/{rollout_id}               operator
POST   /noria/v1/rollback                            operator
GET    /noria/v1/status                              operator
GET    /noria/v1/audit                               operator
GET    /noria/v1/{path:path}                         operator
POST   /noria/v1/{path:path}                         operator
PUT    /noria/v1/{path:path}                         operator
PATCH  /noria/v1/{path:path}                         operator
DELETE /noria/v1/{path:path}                         operator
"""

METHODS = """
InferenceService/CreateChatCompletion client
InferenceService/StreamChatCompletion client
FeedbackService/RecordPreference      annotator operator
FeedbackService/ListPreferences       annotator operator
FeedbackService/DeletePreference      operator
FeedbackService/RecordFeedback        annotator operator
FeedbackService/ListFeedback          annotator operator
FeedbackService/DeleteFeedback        operator
FeedbackService/ForgetEndUser         operator
OperatorService/Retrain               operator
OperatorService/GetJob                operator
OperatorService/ListJobs              operator
OperatorService/CancelJob             operator
OperatorService/WatchJob              operator
OperatorService/ListVersions          operator
OperatorService/Rollout               operator
OperatorService/GetRollout            operator
OperatorService/Rollback              operator
OperatorService/GetStatus             operator
OperatorService/ListAuditEvents       operator
SamplingService/PutAdapter            operator trainer
SamplingService/DeleteAdapter         operator trainer
SamplingService/ListAdapters          operator trainer
SamplingService/SampleGroup           operator trainer
"""


def test_every_route_of_ours_has_the_roles_of_this_list() -> None:
    app, nothing = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), cast(Any, None)
    for router in (
        build_stored_router(nothing, nothing, nothing, nothing, nothing),
        build_sampling_router(nothing),
        build_router(nothing),
    ):
        app.include_router(router)
    assert roles_by_route(app) == {tuple(line.split()[:2]): line.split()[2:] for line in OWN.split("\n") if line}


def test_every_method_has_the_roles_of_this_list() -> None:
    found = {
        f"{service.name}/{method.name}": sorted(grpc_roles(f"/{service.full_name}/{method.name}"))
        for module in (inference_pb2, feedback_pb2, operator_pb2, sampling_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert found == {line.split()[0]: line.split()[1:] for line in METHODS.split("\n") if line}


def test_no_row_is_about_a_method_that_there_is_not() -> None:
    named = {f"/noria.v1.{line.split()[0]}" for line in METHODS.split("\n") if line}
    assert {name for name in GRPC if "reflection" not in name} <= named
    assert len({(row.methods, row.path) for row in HTTP}) == len(HTTP)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sleep"),
        ("GET", "/v1/models/"),
        ("GET", "//v1/models"),
        ("GET", "/v1/models\n"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/collective_rpc"),
        ("GET", "/v1/chat/completions/a/b/messages"),
        ("DELETE", "/v1/chat/completions/"),
        ("GET", "/metrics/x"),
        ("WEBSOCKET", "/v1/chat/completions"),
        ("POST", "/noria/v1/samples/x"),
        ("GET", "/a-route-of-a-later-vllm"),
    ],
)
def test_what_no_row_names_needs_an_operator(method: str, path: str) -> None:
    assert http_roles(method, path) == OPERATOR
    assert grpc_roles("/noria.v1.InferenceService/Later") == OPERATOR


def test_a_head_is_its_get_and_an_exact_row_comes_first() -> None:
    assert http_roles("HEAD", "/v1/models") == http_roles("GET", "/v1/models")
    assert http_roles("POST", "/v1/chat/completions/batch") == {"client"}
    assert http_roles("POST", "/v1/chat/completions/chatcmpl-1") == {"client", "operator"}
