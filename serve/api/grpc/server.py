"""Puts the services, health and reflection on one grpc.aio server, in the event loop that also serves HTTP.

Comes in: the handlers (and with them `server.grpc` of the settings), a chat backend, an address, perhaps certificates.
Goes out: a server that is bound but not started, and its port.
Must not import vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from noria.errors import SettingsError
from noria.settings import GrpcSettings
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
from serve.api.grpc.health import Health
from serve.api.grpc.sampling import SamplingServicer
from serve.api.grpc.services import Feedback, Inference, Operator
from serve.api.handlers import Handlers
from serve.sampling.service import Sampling

COMPRESSION = {"gzip": grpc.Compression.Gzip, "none": grpc.Compression.NoCompression}
SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    feedback_pb2.DESCRIPTOR.services_by_name["FeedbackService"].full_name,
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
    sampling_pb2.DESCRIPTOR.services_by_name["SamplingService"].full_name,
)


async def build_server(
    handlers: Handlers,
    chat: ChatBackend,
    sampling: Sampling,
    interceptors: Sequence[Any],
    *,
    host: str,
    port: int,
    health: Health | None = None,
    credentials: Any = None,
) -> tuple[grpc.aio.Server, int]:
    """The server and the port it is bound to (`port` 0 takes a free one); call it inside the running loop.

    `interceptors` are the front's (`serve.front`); with `credentials` (`serve.tls`) the port speaks TLS. Raises
    SettingsError when the address is taken.
    """
    wire, doors = handlers.settings.server, handlers.settings.doors
    server = grpc.aio.server(
        interceptors=list(interceptors),
        options=[
            *connection_options(wire.grpc, wire.shutdown_s),
            ("grpc.server_handshake_timeout_ms", int(doors.head_s * 1000)),
            ("grpc.max_allowed_incoming_connections", doors.connections),
        ],
        compression=COMPRESSION[wire.grpc.compression],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(chat, doors.stalled_s), server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(Feedback(handlers), server)
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(Operator(handlers), server)
    sampling_pb2_grpc.add_SamplingServiceServicer_to_server(SamplingServicer(sampling), server)
    await _add_standard_services(server, health or Health())
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"cannot listen for gRPC on {address}: {error}", param="server.grpc_port") from error
    return server, bound


def connection_options(settings: GrpcSettings, shutdown_s: float) -> list[tuple[str, int]]:
    """The settings as gRPC's channel arguments; times are whole milliseconds there."""
    size = settings.max_message_mib * 2**20
    options = {
        "grpc.max_receive_message_length": size,
        "grpc.max_send_message_length": size,
        "grpc.max_concurrent_streams": settings.max_streams,
        "grpc.so_reuseport": 0,  # else two servers share a port in silence
        "grpc.keepalive_time_ms": int(settings.keepalive_time_s * 1000),
        "grpc.keepalive_timeout_ms": int(settings.keepalive_timeout_s * 1000),
        "grpc.keepalive_permit_without_calls": int(settings.permit_without_calls),
        "grpc.http2.min_ping_interval_without_data_ms": int(settings.min_ping_interval_s * 1000),
        "grpc.http2.max_ping_strikes": settings.max_ping_strikes,
    }
    if settings.max_connection_age_s is not None:
        options["grpc.max_connection_age_ms"] = int(settings.max_connection_age_s * 1000)
        options["grpc.max_connection_age_grace_ms"] = int(shutdown_s * 1000)
    return list(options.items())


async def _add_standard_services(server: grpc.aio.Server, state: Health) -> None:
    await state.begin(("", *SERVICES))
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
