"""The three services of `noria.v1`: each call is a translation, a handler, a translation back.

Comes in: the generated servicers' calls. Goes out: their messages. Must not import vllm or fastapi.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from noria.records import Json
from noria.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)
from serve.api.chat import ChatBackend
from serve.api.grpc.calls import VERSION_KEY, answering, write
from serve.api.grpc.chat_messages import chunk, completion, request_to_openai, version_of
from serve.api.grpc.convert import fill, to_dict
from serve.api.handlers import Handlers

M = TypeVar("M")


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Chat completions."""

    def __init__(self, chat: ChatBackend, stalled_s: float) -> None:
        """`stalled_s` is how long a piece of an answer may wait for a client that does not read."""
        self._chat, self._stalled_s = chat, stalled_s

    async def CreateChatCompletion(self, request: Any, context: Any) -> Any:
        """The whole answer."""
        async with answering(context, "CreateChatCompletion"):
            answer = await self._chat.chat(request_to_openai(request))
            await self._name_version(context, answer)
            return completion(answer)

    async def StreamChatCompletion(self, request: Any, context: Any) -> None:
        """The answer in pieces; a caller who goes away stops the generation."""
        async with (
            answering(context, "StreamChatCompletion"),
            aclosing(self._chat.stream(request_to_openai(request))) as chunks,
        ):
            named = False
            async for one in chunks:
                if not named:
                    await self._name_version(context, one)
                    named = True
                await write(context, chunk(one), self._stalled_s)

    async def _name_version(self, context: Any, answer: Json) -> None:
        metadata = ((VERSION_KEY, version_of(answer)),)
        await context.send_initial_metadata(metadata)
        context.set_trailing_metadata(metadata)


class Feedback(feedback_pb2_grpc.FeedbackServiceServicer):
    """Preferences and feedback."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    async def RecordPreference(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/preferences."""
        async with answering(context, "RecordPreference"):
            preference, created = await self._handlers.record_preference(to_dict(request))
            values = {"preference": preference, "created": created}
            return fill(feedback_pb2.RecordPreferenceResponse, values)

    async def ListPreferences(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/preferences."""
        return await call(
            context, self._handlers.list_preferences, to_dict(request), feedback_pb2.ListPreferencesResponse
        )

    async def DeletePreference(self, request: Any, context: Any) -> Any:
        """DELETE /noria/v1/preferences/{id}."""
        return await call(context, self._handlers.delete_preference, request.id, feedback_pb2.DeleteResponse)

    async def RecordFeedback(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/feedback."""
        return await call(context, self._handlers.record_feedback, to_dict(request), feedback_pb2.Feedback)

    async def ListFeedback(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/feedback."""
        return await call(context, self._handlers.list_feedback, to_dict(request), feedback_pb2.ListFeedbackResponse)

    async def DeleteFeedback(self, request: Any, context: Any) -> Any:
        """DELETE /noria/v1/feedback/{id}."""
        return await call(context, self._handlers.delete_feedback, request.id, feedback_pb2.DeleteResponse)

    async def ForgetEndUser(self, request: Any, context: Any) -> Any:
        """DELETE /noria/v1/end_users/{user}."""
        return await call(context, self._handlers.forget_end_user, request.user, feedback_pb2.ForgetEndUserResponse)


class Operator(operator_pb2_grpc.OperatorServiceServicer):
    """Jobs, versions, rollouts, status."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    async def Retrain(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/jobs."""
        return await call(context, self._handlers.create_job, to_dict(request), operator_pb2.Job)

    async def GetJob(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/jobs/{id}."""
        return await call(context, self._handlers.get_job, request.id, operator_pb2.Job)

    async def ListJobs(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/jobs."""
        return await call(context, self._handlers.list_jobs, to_dict(request), operator_pb2.ListJobsResponse)

    async def CancelJob(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/jobs/{id}/cancel."""
        return await call(context, self._handlers.cancel_job, request.id, operator_pb2.Job)

    async def WatchJob(self, request: Any, context: Any) -> None:
        """GET /noria/v1/jobs/{id}/events."""
        async with (
            answering(context, "WatchJob"),
            aclosing(await self._handlers.watch_job(request.id, request.after)) as events,
        ):
            async for event in events:
                await write(context, fill(operator_pb2.JobEvent, event), self._handlers.settings.doors.stalled_s)

    async def ListVersions(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/versions."""
        return await call(context, self._handlers.list_versions, to_dict(request), operator_pb2.ListVersionsResponse)

    async def Rollout(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/rollouts."""
        return await call(context, self._handlers.create_rollout, to_dict(request), operator_pb2.RolloutState)

    async def GetRollout(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/rollouts/{id}."""
        return await call(context, self._handlers.get_rollout, request.id, operator_pb2.RolloutState)

    async def Rollback(self, request: Any, context: Any) -> Any:
        """POST /noria/v1/rollback."""
        async with answering(context, "Rollback"):
            return fill(operator_pb2.RolloutState, await self._handlers.rollback())

    async def ListAuditEvents(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/audit."""
        return await call(
            context, self._handlers.list_audit_events, to_dict(request), operator_pb2.ListAuditEventsResponse
        )

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """GET /noria/v1/status."""
        async with answering(context, "GetStatus"):
            return fill(operator_pb2.Status, await self._handlers.status())


async def call(context: Any, handler: Callable[[Any], Awaitable[Json]], argument: Any, answer: type[M]) -> M | None:
    """One unary call: the handler's dict as a message. None only after the call was ended with an error."""
    async with answering(context, handler.__name__):
        return fill(answer, await handler(argument))
    return None
