"""Puts the services, health and reflection on one grpc.aio server, in the event loop that also serves HTTP.

Comes in: the handlers, a chat backend, an address. Goes out: a server that is bound but not started, and its port.
Must not import vllm.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from noria.errors import SettingsError
from noria.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    sampling_pb2,
    sampling_pb2_grpc,
)
from serve.api.chat import ChatBackend
from serve.api.grpc.calls import KeyInterceptor
from serve.api.grpc.sampling import SamplingServicer
from serve.api.grpc.services import Feedback, Inference, Operator
from serve.api.handlers import Handlers
from serve.sampling.service import Sampling

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # pictures travel in the message; gRPC's default of 4 MiB is one photograph
SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    feedback_pb2.DESCRIPTOR.services_by_name["FeedbackService"].full_name,
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
    sampling_pb2.DESCRIPTOR.services_by_name["SamplingService"].full_name,
)


async def build_server(
    handlers: Handlers, chat: ChatBackend, sampling: Sampling, *, host: str, port: int, api_key: str | None = None
) -> tuple[grpc.aio.Server, int]:
    """The server and the port it is bound to (`port` 0 takes a free one); call it inside the running loop.

    `api_key` is the settings' when None. Raises SettingsError when the address is taken.
    """
    key = api_key or handlers.api_key
    doors = handlers.settings.doors
    server = grpc.aio.server(
        interceptors=[KeyInterceptor(key)] if key else [],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # else two servers share a port in silence
            ("grpc.server_handshake_timeout_ms", int(doors.head_s * 1000)),
        ],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(chat, doors.stalled_s), server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(Feedback(handlers), server)
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(Operator(handlers), server)
    sampling_pb2_grpc.add_SamplingServiceServicer_to_server(SamplingServicer(sampling), server)
    await _add_standard_services(server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"cannot listen for gRPC on {address}: {error}", param="server.grpc_port") from error
    return server, bound


async def _add_standard_services(server: grpc.aio.Server) -> None:
    servicer = health.aio.HealthServicer()
    for name in ("", *SERVICES):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
