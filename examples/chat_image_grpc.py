"""Asks about a picture over gRPC: its bytes travel as they are, without base64.

python examples/chat_image_grpc.py [HOST:PORT] [PICTURE]     NORIA_API_KEY: a key with the role client
"""

import io
import os
import sys
from pathlib import Path

import grpc
from PIL import Image

from noria.v1 import inference_pb2 as pb
from noria.v1 import inference_pb2_grpc

KEY = (("authorization", f"Bearer {os.environ.get('NORIA_API_KEY', 'none')}"),)  # unread by a server without keys
address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
if len(sys.argv) > 2:
    picture = Path(sys.argv[2]).read_bytes()
else:
    drawn = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(drawn, "PNG")
    picture = drawn.getvalue()

# A server with TLS: grpc.secure_channel(address, grpc.ssl_channel_credentials(Path("ca.pem").read_bytes()))
with grpc.insecure_channel(address) as channel:
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.CreateChatCompletionRequest(temperature=0, max_tokens=32, metadata={"example": "picture"})
    message = request.messages.add(role="user")
    message.parts.add().image.data = picture
    message.parts.add().text = "Which colour is it?"

    answer = inference.CreateChatCompletion(request, timeout=60, metadata=KEY)

print(f"{answer.model_version} says: {answer.choices[0].message.content}")
