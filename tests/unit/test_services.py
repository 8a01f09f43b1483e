"""Every call that a proto names is answered by our own code, not by the generated class and its UNIMPLEMENTED."""

from __future__ import annotations

from typing import Any

import pytest

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
from serve.api.grpc.sampling import SamplingServicer
from serve.api.grpc.services import Feedback, Inference, Operator


@pytest.mark.parametrize(
    ("ours", "generated", "proto"),
    [
        (Inference, inference_pb2_grpc.InferenceServiceServicer, inference_pb2),
        (Feedback, feedback_pb2_grpc.FeedbackServiceServicer, feedback_pb2),
        (Operator, operator_pb2_grpc.OperatorServiceServicer, operator_pb2),
        (SamplingServicer, sampling_pb2_grpc.SamplingServiceServicer, sampling_pb2),
    ],
)
def test_every_call_is_ours(ours: type, generated: type, proto: Any) -> None:
    (service,) = proto.DESCRIPTOR.services_by_name.values()
    calls = [method.name for method in service.methods]
    assert calls, service.full_name
    assert [name for name in calls if getattr(ours, name) is getattr(generated, name)] == []
