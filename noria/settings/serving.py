"""What serves: where it listens, what vLLM is started with, what is sampled beside it, how versions go live.

Comes in: a tree. Goes out: frozen sections. Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from noria.module_settings import Section
from noria.settings.wire import GrpcSettings, TlsSettings


class ServerSettings(Section):
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address both wires bind to."""
    http_port: int = Field(8000, ge=0, le=65535)
    """HTTP port; 0 takes a free one."""
    grpc_port: int = Field(50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one."""
    served_model_name: str = "noria"
    """The model name that clients send."""
    shutdown_s: float = Field(20.0, ge=0)
    """How long a stopping server lets running requests finish, in seconds."""
    api_key: SecretStr | None = None
    """A bearer key with every role, beside those of `noria keys`. With neither, no call needs a key."""
    trainer_key: SecretStr | None = None
    """A bearer key with the role `trainer` alone. `noria up` draws one for its own trainer at each start; it does not
    make the server ask others for keys."""
    insecure: bool = False
    """Listen on other addresses than this machine's own without any key. Whoever reaches the port is an operator."""
    tls: TlsSettings = TlsSettings()
    grpc: GrpcSettings = GrpcSettings()

    def host_here(self) -> str:
        """The host as a client on this machine writes it."""
        if self.tls.on and self.tls.name:
            return self.tls.name
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104  compared, not bound
        return f"[{host}]" if ":" in host else host

    def url_here(self, http_port: int) -> str:
        """The server's URL for a client on this machine."""
        return f"{'https' if self.tls.on else 'http'}://{self.host_here()}:{http_port}"


class EngineSettings(Section):
    """What vLLM is started with."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Activation type; `auto` is bfloat16 on a CPU and the checkpoint's own on a GPU."""
    max_model_len: int | None = Field(None, ge=64)
    """Longest prompt plus answer, in tokens; none takes the checkpoint's, at most 4096."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Sequences that run at once; none is 16 on a CPU and vLLM's own on a GPU."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU, in GiB. On a GPU `gpu_memory_utilization` rules."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    enforce_eager: bool | None = None
    """Skip CUDA graphs and compilation; none is true on a CPU and false on a GPU."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads of the engine on a CPU; none takes every core."""
    int8_activations: bool = False
    """Let a CPU with AMX round activations to 8 bits: quicker for one client, but not what was verified. Raise
    train.verify.probe_tolerance to 0.5 with it."""
    fast_start: bool = True
    """Start the engine from a fork server that has vLLM preloaded, its worker inside the engine process."""
    policy_adapters: int = Field(0, ge=0)
    """LoRAs that a trainer may have loaded beside the live version, to sample from; 0 is none. The base then answers
    users at some 0.8 of its speed, loaded or not."""
    policy_rank: Literal[8, 16, 32, 64, 128, 256] = 16
    """Highest rank of such a LoRA."""
    args: tuple[str, ...] = ()
    """More of vLLM's own command-line arguments, as they are: `["--enable-lora"]`."""


class SamplingSettings(Section):
    """Sampling for trainers and operators, beside the users' traffic and below it."""

    sequences: int | None = Field(None, ge=1)
    """Samples in the engine at once while no user's request is; none is every sequence that the engine runs."""
    beside_users: int | None = Field(None, ge=0)
    """The same while users' requests are inside; the others are set back and go on later. None is 1 on a CPU and a
    quarter of the sequences on a GPU; with 0 sampling stands still for as long as anybody is answered."""


class ReleaseSettings(Section):
    """How a new version goes live."""

    drain_s: float = Field(60.0, gt=0)
    """Longest wait for running requests before a swap; past it the rollout fails and traffic goes on."""
    poll_s: float = Field(0.5, gt=0)
    """How often the server looks for a rollout, in seconds."""
