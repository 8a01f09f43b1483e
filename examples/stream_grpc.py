"""Reads an answer as it is generated, within a deadline; asyncio throughout.

python examples/stream_grpc.py [HOST:PORT]     NORIA_API_KEY: a key with the role client
"""

import asyncio
import os
import sys

import grpc

from noria.v1 import inference_pb2 as pb
from noria.v1 import inference_pb2_grpc

KEY = (("authorization", f"Bearer {os.environ.get('NORIA_API_KEY', 'none')}"),)  # unread by a server without keys
ENOUGH = 200  # characters


async def main(address: str) -> None:
    """Prints the pieces as they come."""
    async with grpc.aio.insecure_channel(address) as channel:
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.CreateChatCompletionRequest(temperature=0.7, max_tokens=64)
        request.messages.add(role="user", content="Tell me about water wheels.")
        # Past the deadline the engine stops, too.
        call = inference.StreamChatCompletion(request, timeout=60, metadata=KEY)
        read = 0
        try:
            async for chunk in call:
                for choice in chunk.choices:
                    print(choice.delta.content, end="", flush=True)
                    read += len(choice.delta.content)
                if read > ENOUGH:
                    call.cancel()  # so does cancelling
                if chunk.HasField("usage"):
                    print(f"\n({chunk.usage.completion_tokens} tokens from {chunk.model_version})")
        except asyncio.CancelledError:
            print("\n(that was enough)")
        except grpc.aio.AioRpcError as error:
            sys.exit(f"\n{error.code().name}: {error.details()}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
