"""Starts vLLM's engine and its OpenAI application inside this process, as Noria needs them.

Comes in: settings and the folder of the live version. Goes out: vLLM's arguments, an `AsyncLLM`, and vLLM's own
FastAPI application with its handlers signed and captured. vLLM is imported inside functions: a wrong setting is told
before its eight seconds of import.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from noria.errors import NoriaError, SettingsError
from noria.settings import Settings
from serve.capture.chat import CapturingChat, CapturingMessages
from serve.capture.queue import CaptureQueue
from serve.engine.environment import engines_from_fork_server, has_gpu
from serve.engine.media import register_connector
from serve.engine.proxy import EngineProxy
from serve.engine.signed import Signed, SignedCompletions, adopt, follow_models
from serve.engine.versions import VersionGate
from serve.input.media import MediaDoor
from serve.input.refusals import Refusals

logger = logging.getLogger("noria.engine")
WORKER_EXTENSION = "serve.release.worker"
LONGEST_CONTEXT = 4096  # tokens, where neither the settings nor the checkpoint ask for less
SEQUENCES_ON_CPU = 16
PRIORITIES = "--scheduling-policy"
SAFE_FORMATS = ("safetensors", "fastsafetensors", "runai_streamer")
UNSAFE = {
    "trust_remote_code": "is refused: it runs code that comes with a checkpoint",
    "allowed_local_media_path": "is refused: say input.images.allowed_folder",
    "allowed_media_domains": "is refused: say input.images.fetch and input.images.allowed_hosts",
    "enable_mm_embeds": "is refused: it unpickles what clients send",
    "enable_prompt_embeds": "is refused: it unpickles what clients send",
    "trust_request_mm_kwargs": "is refused: what is stored would not tell what the model was shown",
}


def engine_flags(settings: Settings, model: Path, version: str) -> list[str]:
    """The settings as vLLM's command line has them; `engine.args` come last and win."""
    engine, cpu = settings.engine, not has_gpu()
    dtype = "bfloat16" if engine.dtype == "auto" and cpu else engine.dtype
    flags = [f"--model={model}", f"--dtype={dtype}", f"--max-model-len={context_length(settings, model)}"]
    flags += ["--served-model-name", *dict.fromkeys((settings.server.served_model_name, version))]
    sequences = engine.max_num_seqs or (SEQUENCES_ON_CPU if cpu else None)
    if sequences is not None:
        flags.append(f"--max-num-seqs={sequences}")
    if cpu:
        flags.append(f"--kv-cache-memory-bytes={int(engine.kv_cache_gib * 2**30)}")
        if engine.fast_start:
            flags.append("--distributed-executor-backend=uni")
    else:
        flags.append(f"--gpu-memory-utilization={engine.gpu_memory_utilization}")
    if cpu if engine.enforce_eager is None else engine.enforce_eager:
        flags.append("--enforce-eager")
    if importlib.util.find_spec(WORKER_EXTENSION) is not None:
        flags.append(f"--worker-extension-cls={WORKER_EXTENSION}.NoriaWorkerExtension")
    flags.append(f"{PRIORITIES}=priority")  # sampling is scheduled below users
    flags.append("--load-format=safetensors")  # vLLM's own choice falls back to pickles
    if engine.policy_adapters:
        room = [f"--max-loras={engine.policy_adapters}", f"--max-cpu-loras={engine.policy_adapters}"]
        flags += ["--enable-lora", *room, f"--max-lora-rank={engine.policy_rank}"]
    return [*flags, "--disable-uvicorn-access-log", *engine.args]


def context_length(settings: Settings, model: Path) -> int:
    """The longest prompt plus answer, in tokens: the setting, else the checkpoint's, but at most 4096."""
    if settings.engine.max_model_len is not None:
        return settings.engine.max_model_len
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config") or config.get("llm_config") or config
    return min(int(config.get("max_position_embeddings") or LONGEST_CONTEXT), LONGEST_CONTEXT)


def parse_flags(flags: list[str]) -> Namespace:
    """vLLM's own parser over the flags. Raises SettingsError naming `engine.args` where it refuses them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = io.StringIO()
    try:
        with redirect_stderr(said):  # the parser prints two hundred lines of usage before its one line of reason
            args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
            validate_parsed_serve_args(args)
    except (SystemExit, TypeError, ValueError) as error:
        reason = said.getvalue().rpartition("error: ")[2].strip() or str(error)
        raise SettingsError(
            f"vLLM refuses its arguments: {reason}\n(they were {flags})", param="engine.args"
        ) from error
    refuse_unsafe(args)
    return args


def refuse_unsafe(args: Namespace) -> None:
    """Raises SettingsError for what would run a checkpoint's code, or let media in by another way than Noria's."""
    for name, why in UNSAFE.items():
        if getattr(args, name, None):
            raise SettingsError(f"engine.args: --{name.replace('_', '-')} {why}", param="engine.args")
    if args.load_format not in SAFE_FORMATS:
        said = f"engine.args: --load-format={args.load_format} is refused: weights are read from safetensors alone"
        raise SettingsError(said, param="engine.args")


def start_engine(args: Namespace, *, fast: bool) -> Any:
    """A running `AsyncLLM`; call it inside the event loop, which it keeps busy until the engine is up.

    `fast` forks the engine from the fork server; where that fails, vLLM's own way is taken, and said in the log.
    Raises NoriaError when the engine does not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    def launch(from_fork_server: bool) -> Any:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with engines_from_fork_server() if from_fork_server else nullcontext():
            return AsyncLLM.from_vllm_config(
                config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=args.disable_log_stats
            )

    if fast:
        try:
            return launch(True)
        except (OSError, EOFError, ImportError) as error:
            logger.warning("the fork server did not give an engine; starting it anew", exc_info=error)
    try:
        return launch(False)
    except RuntimeError as error:
        raise NoriaError(f"vLLM's engine did not start: {error}; its own log is above", code="engine_failed") from error


async def build_application(
    engine: Any,
    args: Namespace,
    gate: VersionGate,
    capture: CaptureQueue | None,
    settings: Settings,
    refusals: Refusals,
) -> Any:
    """vLLM's FastAPI application over the engine, all its routes kept, every generation behind the gate.

    Pictures come in through `serve.input`, whichever route or wire a request takes.

    Without `capture` nothing of the traffic is kept.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    register_connector(MediaDoor(settings.input.images, refusals))
    await engine.reset_mm_cache()
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    asked = any(word.startswith(PRIORITIES) for word in settings.engine.args)
    await init_app_state(EngineProxy(engine, gate, keep_priority=asked), app.state, args, tasks)
    follow_models(app.state.openai_serving_models, settings.server.served_model_name, gate)
    captured = {"noria_gate": gate, "noria_capture": capture, "noria_settings": settings.capture}
    for name, mixin in (("openai_serving_chat", CapturingChat), ("anthropic_serving_messages", CapturingMessages)):
        if getattr(app.state, name, None) is not None:
            adopt(getattr(app.state, name), mixin, **captured)
    if app.state.openai_serving_completion is not None:
        adopt(app.state.openai_serving_completion, SignedCompletions, noria_gate=gate)
    if app.state.openai_serving_chat_batch is not None:
        adopt(app.state.openai_serving_chat_batch, Signed, noria_gate=gate)
    return app
