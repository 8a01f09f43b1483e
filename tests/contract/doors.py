"""The two doors with one face: the same calls over HTTP and over gRPC, the same plain values back.

Comes in: an address. Goes out: dicts without what is not set, or `Refused`. Tests compare the two.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import httpx
from google.protobuf import json_format

from noria.errors import WIRE
from noria.records import Json
from noria.tls import Trust
from noria.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)
from serve.api.grpc.convert import to_dict

TIMEOUT_S = 120.0
GRPC_OF_HTTP = {wire.http_status: wire.grpc_status for wire in reversed(WIRE.values())}  # a status's first row counts


@dataclass
class Refused(Exception):
    """An error as a caller sees it: gRPC's name of the status, and OpenAI's error object."""

    status: str
    message: str
    type: str
    param: str | None
    code: str | None


class Door(Protocol):
    """What a caller can do through either door."""

    name: str

    def chat(self, text: str, image: bytes | None = None, **more: Any) -> Json:
        """One answer, with `model_version` as the door names it."""
        ...

    def stream(self, text: str, image: bytes | None = None, **more: Any) -> Iterator[Json]:
        """One answer's chunks."""
        ...

    def prefer(self, body: Json) -> Json:
        """A preference, with `created`."""
        ...

    def feedback(self, body: Json) -> Json:
        """A feedback."""
        ...

    def retrain(self, body: Json) -> Json:
        """A job."""
        ...

    def cancel(self, job_id: str) -> Json:
        """The job."""
        ...

    def job(self, job_id: str) -> Json:
        """The job."""
        ...

    def watch(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """The job's events."""
        ...

    def versions(self) -> Json:
        """A page."""
        ...

    def preferences(self, **query: Any) -> Json:
        """A page."""
        ...

    def rollout(self, body: Json) -> Json:
        """A rollout."""
        ...

    def rollback(self) -> Json:
        """A rollout."""
        ...

    def status(self) -> Json:
        """How things stand."""
        ...

    def forget(self, user: str) -> Json:
        """What was deleted."""
        ...

    def audit(self, **query: Any) -> Json:
        """A page of the audit log."""
        ...


class HttpDoor:
    """Over HTTP."""

    name = "http"

    def __init__(self, url: str, api_key: str | None = None, trust: Trust | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        verify: Any = True if trust is None else trust.context()
        self.client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, verify=verify)

    def chat(self, text: str, image: bytes | None = None, **more: Any) -> Json:
        """POST /v1/chat/completions."""
        answer = self.client.post("/v1/chat/completions", json=chat_body(text, image, **more))
        version = {"model_version": answer.headers.get("x-noria-model-version")}
        return {**_said(answer), **version}

    def stream(self, text: str, image: bytes | None = None, **more: Any) -> Iterator[Json]:
        """The same with `stream`."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body = chat_body(text, image, **more, **streaming)
        with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code >= 400:
                answer.read()
            _check(answer)
            version = answer.headers.get("x-noria-model-version")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield {**json.loads(line[6:]), "model_version": version}

    def prefer(self, body: Json) -> Json:
        """POST /noria/v1/preferences."""
        answer = self.client.post("/noria/v1/preferences", json=body)
        return {**_said(answer), "created": answer.status_code == 201}

    def feedback(self, body: Json) -> Json:
        """POST /noria/v1/feedback."""
        return _said(self.client.post("/noria/v1/feedback", json=body))

    def retrain(self, body: Json) -> Json:
        """POST /noria/v1/jobs."""
        return _said(self.client.post("/noria/v1/jobs", json=body))

    def cancel(self, job_id: str) -> Json:
        """POST /noria/v1/jobs/ID/cancel."""
        return _said(self.client.post(f"/noria/v1/jobs/{job_id}/cancel"))

    def job(self, job_id: str) -> Json:
        """GET /noria/v1/jobs/ID."""
        return _said(self.client.get(f"/noria/v1/jobs/{job_id}"))

    def watch(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """GET /noria/v1/jobs/ID/events."""
        headers = {"last-event-id": str(after)} if after else {}
        with self.client.stream("GET", f"/noria/v1/jobs/{job_id}/events", headers=headers) as answer:
            if answer.status_code >= 400:
                answer.read()
            _check(answer)
            seq = ""
            for line in answer.iter_lines():
                key, _, value = line.partition(": ")
                seq = value if key == "id" else seq
                if key == "data":
                    event = json.loads(value)
                    assert str(event["seq"]) == seq
                    yield event

    def versions(self) -> Json:
        """GET /noria/v1/versions."""
        return _said(self.client.get("/noria/v1/versions"))

    def preferences(self, **query: Any) -> Json:
        """GET /noria/v1/preferences."""
        return _said(self.client.get("/noria/v1/preferences", params=query))

    def rollout(self, body: Json) -> Json:
        """POST /noria/v1/rollouts."""
        return _said(self.client.post("/noria/v1/rollouts", json=body))

    def rollback(self) -> Json:
        """POST /noria/v1/rollback."""
        return _said(self.client.post("/noria/v1/rollback"))

    def status(self) -> Json:
        """GET /noria/v1/status."""
        return _said(self.client.get("/noria/v1/status"))

    def forget(self, user: str) -> Json:
        """DELETE /noria/v1/end_users/USER."""
        return _said(self.client.delete(f"/noria/v1/end_users/{user}"))

    def audit(self, **query: Any) -> Json:
        """GET /noria/v1/audit."""
        return _said(self.client.get("/noria/v1/audit", params=query))


class GrpcDoor:
    """Over gRPC."""

    name = "grpc"

    def __init__(self, address: str, api_key: str | None = None, trust: Trust | None = None) -> None:
        self.address = address
        self.channel = (
            grpc.insecure_channel(address)
            if trust is None
            else grpc.secure_channel(address, trust.channel_credentials())
        )
        self._options: Json = {"timeout": TIMEOUT_S}
        if api_key:
            self._options["metadata"] = (("authorization", f"Bearer {api_key}"),)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self._operator = operator_pb2_grpc.OperatorServiceStub(self.channel)

    def chat(self, text: str, image: bytes | None = None, **more: Any) -> Json:
        """CreateChatCompletion."""
        try:
            answer, call = self.inference.CreateChatCompletion.with_call(
                chat_request(text, image, **more), **self._options
            )
        except grpc.RpcError as error:
            raise refused(error) from error
        assert dict(call.initial_metadata())["x-noria-model-version"] == answer.model_version
        return to_dict(answer)

    def stream(self, text: str, image: bytes | None = None, **more: Any) -> Iterator[Json]:
        """StreamChatCompletion."""
        return self._many(self.inference.StreamChatCompletion, chat_request(text, image, **more))

    def prefer(self, body: Json) -> Json:
        """RecordPreference."""
        request = json_format.ParseDict(body, feedback_pb2.RecordPreferenceRequest())
        answer = self._one(self._feedback.RecordPreference, request)
        return {**answer["preference"], "created": answer.get("created", False)}

    def feedback(self, body: Json) -> Json:
        """RecordFeedback."""
        request = json_format.ParseDict(body, feedback_pb2.RecordFeedbackRequest())
        return self._one(self._feedback.RecordFeedback, request)

    def retrain(self, body: Json) -> Json:
        """Retrain."""
        return self._one(self._operator.Retrain, json_format.ParseDict(body, operator_pb2.RetrainRequest()))

    def cancel(self, job_id: str) -> Json:
        """CancelJob."""
        return self._one(self._operator.CancelJob, operator_pb2.CancelJobRequest(id=job_id))

    def job(self, job_id: str) -> Json:
        """GetJob."""
        return self._one(self._operator.GetJob, operator_pb2.GetJobRequest(id=job_id))

    def watch(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """WatchJob."""
        return self._many(self._operator.WatchJob, operator_pb2.WatchJobRequest(id=job_id, after=after))

    def versions(self) -> Json:
        """ListVersions."""
        return self._one(self._operator.ListVersions, operator_pb2.ListVersionsRequest())

    def preferences(self, **query: Any) -> Json:
        """ListPreferences."""
        return self._one(self._feedback.ListPreferences, feedback_pb2.ListPreferencesRequest(**query))

    def rollout(self, body: Json) -> Json:
        """Rollout."""
        return self._one(self._operator.Rollout, json_format.ParseDict(body, operator_pb2.RolloutRequest()))

    def rollback(self) -> Json:
        """Rollback."""
        return self._one(self._operator.Rollback, operator_pb2.RollbackRequest())

    def status(self) -> Json:
        """GetStatus."""
        return self._one(self._operator.GetStatus, operator_pb2.GetStatusRequest())

    def forget(self, user: str) -> Json:
        """ForgetEndUser."""
        return self._one(self._feedback.ForgetEndUser, feedback_pb2.ForgetEndUserRequest(user=user))

    def audit(self, **query: Any) -> Json:
        """ListAuditEvents."""
        return self._one(self._operator.ListAuditEvents, operator_pb2.ListAuditEventsRequest(**query))

    def _one(self, method: Any, request: Any) -> Json:
        try:
            return to_dict(method(request, **self._options))
        except grpc.RpcError as error:
            raise refused(error) from error

    def _many(self, method: Any, request: Any) -> Iterator[Json]:
        try:
            for message in method(request, **self._options):
                yield to_dict(message)
        except grpc.RpcError as error:
            raise refused(error) from error


def chat_body(text: str, image: bytes | None, **more: Any) -> Json:
    """The HTTP body: the picture as a data: URL."""
    content: Any = text
    if image is not None:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "noria", "messages": [{"role": "user", "content": content}], **more}


def chat_request(text: str, image: bytes | None, **more: Any) -> Any:
    """The gRPC message: the picture as bytes."""
    message = inference_pb2.ChatMessage(role="user")
    if image is None:
        message.content = text
    else:
        message.parts.add().image.data = image
        message.parts.add().text = text
    request = inference_pb2.CreateChatCompletionRequest(model=more.pop("model", "noria"), messages=[message])
    return json_format.ParseDict(more, request)


def refused(error: Any) -> Refused:
    """What a failed call says: its status, and the error object beside it."""
    details = dict(error.trailing_metadata() or ())
    body = json.loads(details["noria-error-bin"])["error"] if "noria-error-bin" in details else None
    if body is None:
        raise AssertionError(f"no error object with {error.code()}: {error.details()}")
    assert error.details() == body["message"]
    return Refused(error.code().name, **body)


def plain(value: Any) -> Any:
    """The value without what is not set (None, empty), which is how a message shows it; 1.0 is 1."""
    if isinstance(value, dict):
        kept = {key: plain(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one not in (None, "", [], {}, 0, False)}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


def _said(answer: httpx.Response) -> Json:
    _check(answer)
    said: Json = answer.json()
    return said


def _check(answer: httpx.Response) -> None:
    if answer.status_code >= 400:
        body = answer.json()["error"]
        raise Refused(
            GRPC_OF_HTTP[answer.status_code], **{key: body[key] for key in ("message", "type", "param", "code")}
        )
