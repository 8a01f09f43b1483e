"""Takes two answers to one question and says which is better; errors carry OpenAI's error object.

python examples/preference_grpc.py [HOST:PORT]     NORIA_API_KEY: a key with the roles client and annotator
"""

import json
import os
import sys

import grpc

from noria.v1 import feedback_pb2, feedback_pb2_grpc, inference_pb2, inference_pb2_grpc

KEY = (("authorization", f"Bearer {os.environ.get('NORIA_API_KEY', 'none')}"),)  # unread by a server without keys
address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
with grpc.insecure_channel(address) as channel:
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    feedback = feedback_pb2_grpc.FeedbackServiceStub(channel)

    # Two samples of one prompt. `store` keeps them, so that they can be named afterwards.
    request = inference_pb2.CreateChatCompletionRequest(n=2, temperature=1, max_tokens=32, store=True, user="u-17")
    request.messages.add(role="user", content="What is a noria?")
    answer = inference.CreateChatCompletion(request, timeout=60, metadata=KEY)
    for choice in answer.choices:
        print(f"[{choice.index}] {choice.message.content}")

    # Somebody (here: the length) decides. The preference is on disk when the call returns.
    better = min(answer.choices, key=lambda choice: len(choice.message.content)).index
    judged = feedback.RecordPreference(
        feedback_pb2.RecordPreferenceRequest(
            chosen=feedback_pb2.Side(completion_id=answer.id, index=better),
            rejected=feedback_pb2.Side(completion_id=answer.id, index=1 - better),
            annotator="u-17",
            comment="shorter",
        ),
        timeout=30,
        metadata=KEY,
    )
    print(f"kept as {judged.preference.id}")

    # What is wrong is refused with a status, and with details that name the field.
    try:
        same = feedback_pb2.Side(completion_id=answer.id, index=0)
        wrong = feedback_pb2.RecordPreferenceRequest(chosen=same, rejected=same)
        feedback.RecordPreference(wrong, timeout=30, metadata=KEY)
    except grpc.RpcError as error:
        details = json.loads(dict(error.trailing_metadata())["noria-error-bin"])["error"]
        print(f"refused: {error.code().name}, {details['param']}: {details['message']}")
