"""The OpenAPI document and the server agree: schemathesis sends what the document allows, and what it forbids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.contract.conftest import System, fake_system

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
TIMEOUT_S = 30
QUICK = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MOST_ROUTES = {GenerationMode.POSITIVE: 31, GenerationMode.NEGATIVE: 16}  # fewer would mean that some were not tried
OURS = ["noria", "sampling", "stored completions"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system over the fake engine."""
    with fake_system(tmp_path_factory.mktemp("document") / "home") as made:
        yield made


@pytest.fixture(scope="module")
def ours(system: System) -> Any:
    """Our routes of the server's own document."""
    return schemathesis.openapi.from_url(f"{system.http.client.base_url}/openapi.json").include(tag=OURS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_route_answers_as_documented(system: System, ours: Any, mode: GenerationMode) -> None:
    """Statuses, content types and bodies are those of the document, and none is a 500, whatever is sent."""
    failed: dict[str, str] = {}
    sent: Counter[str] = Counter()
    for found in ours.get_all_operations():
        operation = found.ok()

        @settings(QUICK)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            sent[case.operation.label] += 1
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

        try:
            ask()
        except Unsatisfiable:
            continue  # of a route without anything to vary there is nothing wrong to send
        except (AssertionError, BaseExceptionGroup) as error:  # told below, all together
            failed[operation.label] = str(error)
    assert not failed, "\n".join(f"{label}: {why}" for label, why in failed.items())
    assert len(sent) >= MOST_ROUTES[mode] and sum(sent.values()) >= 4 * len(sent), sent
    assert system.http.status()["object"] == "status"


def test_real_answers_have_the_documented_shapes(system: System, ours: Any) -> None:
    """What exists is answered in its shape, too: each route that gives something gives a 2xx here."""
    client = system.http.client
    ids = [system.http.chat("which?", store=True, n=2, seed=3, temperature=1)["id"] for _ in range(2)]
    side = {"completion_id": ids[0], "index": 0}
    preference = {"chosen": side, "rejected": {"completion_id": ids[0], "index": 1}, "annotator": "u-1"}
    edit = {**side, "edit": "better", "rating": 2, "annotator": "u-1"}
    calls: list[tuple[str, str, str, Any]] = [
        ("POST", "/noria/v1/preferences", "/noria/v1/preferences", preference),
        ("POST", "/noria/v1/preferences", "/noria/v1/preferences", preference),
        ("GET", "/noria/v1/preferences", "/noria/v1/preferences?limit=1", None),
        ("POST", "/noria/v1/feedback", "/noria/v1/feedback", edit),
        ("GET", "/noria/v1/feedback", "/noria/v1/feedback?order=asc", None),
        ("GET", "/noria/v1/status", "/noria/v1/status", None),
        ("GET", "/noria/v1/jobs", "/noria/v1/jobs", None),
        ("GET", "/noria/v1/versions", "/noria/v1/versions", None),
        ("GET", "/noria/v1/versions/{version_id}", "/noria/v1/versions/v1", None),
        ("GET", "/noria/v1/rollouts", "/noria/v1/rollouts", None),
        ("GET", "/noria/v1/adapters", "/noria/v1/adapters", None),
        ("POST", "/noria/v1/samples", "/noria/v1/samples", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        ("GET", "/v1/chat/completions", "/v1/chat/completions?limit=1&order=desc", None),
        ("GET", "/v1/chat/completions/{completion_id}", f"/v1/chat/completions/{ids[0]}", None),
        ("GET", "/v1/chat/completions/{completion_id}/messages", f"/v1/chat/completions/{ids[0]}/messages", None),
        ("POST", "/v1/chat/completions/{completion_id}", f"/v1/chat/completions/{ids[0]}", {"metadata": {"a": "b"}}),
        ("DELETE", "/v1/chat/completions/{completion_id}", f"/v1/chat/completions/{ids[1]}", None),
        ("DELETE", "/noria/v1/end_users/{user}", "/noria/v1/end_users/nobody", None),
        ("GET", "/noria/v1/audit", "/noria/v1/audit?action=forget_end_user", None),
        ("GET", "/noria/v1/limits", "/noria/v1/limits", None),
    ]
    for method, path, url, body in calls:
        answer = client.request(method, url, json=body) if body is not None else client.request(method, url)
        assert answer.is_success, (method, url, answer.text)
        ours[path][method].validate_response(answer)


def test_a_job_and_its_rollback_have_the_documented_shapes(system: System, ours: Any) -> None:
    """A job from its order to its cancellation, with its events as a stream; nothing to roll back to is a 409."""
    client = system.http.client
    for number in range(4):
        made = system.http.chat(f"job {number}", store=True, n=2, seed=number, temperature=1)["id"]
        sides = [{"completion_id": made, "index": index} for index in (0, 1)]
        client.post("/noria/v1/preferences", json={"chosen": sides[0], "rejected": sides[1]})
    job = client.post("/noria/v1/jobs", json={"method": "dpo", "settings": {"min_pairs": 2}})
    assert job.status_code == 202, job.text
    ours["/noria/v1/jobs"]["POST"].validate_response(job)
    one = f"/noria/v1/jobs/{job.json()['id']}"
    ours["/noria/v1/jobs/{job_id}"]["GET"].validate_response(client.get(one))
    ours["/noria/v1/jobs/{job_id}/cancel"]["POST"].validate_response(client.post(f"{one}/cancel"))
    events = client.get(f"{one}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    ours["/noria/v1/jobs/{job_id}/events"]["GET"].validate_response(events)
    back = client.post("/noria/v1/rollback")
    assert back.status_code == 409
    ours["/noria/v1/rollback"]["POST"].validate_response(back)


def test_the_document_names_every_field_of_the_bodies(ours: Any) -> None:
    """Raw bodies are described by the schemas that validate them."""
    said = ours.raw_schema["paths"]["/noria/v1/preferences"]["post"]["requestBody"]["content"]["application/json"]
    assert set(said["schema"]["properties"]) == {"chosen", "rejected", "verdict", "annotator", "comment"}
    assert "$ref" not in str(said)
    listed = ours.raw_schema["paths"]["/noria/v1/preferences"]["get"]["parameters"]
    assert {one["name"] for one in listed} == {"after", "limit", "order", "annotator"}


def test_the_document_tells_of_keys(ours: Any) -> None:
    """A generated client has somewhere to put its key, on every route of ours."""
    schemes = ours.raw_schema["components"]["securitySchemes"]
    assert {one["scheme"] for one in schemes.values()} == {"bearer"}
    assert all(operation.ok().definition.raw["security"] for operation in ours.get_all_operations())
