"""Samples per second: groups from the serving engine, and from TRL's own generation without vLLM, of the same model.

Comes in: a home that nobody uses meanwhile (`--home`), else the embedded model is built. Goes out: a table.
Both answer the same questions about drawn pictures with the same policy, the live version under a LoRA that is still 0:
the engine on its 4-bit weights over gRPC, TRL 1.16's GRPOTrainer on the master by transformers' `generate`, a
generation batch of `--prompts` groups at a time. They run one after the other, `--rounds` times, in alternating order;
neither trains. A sample is counted with the tokens that it has, its end included. Start, loading and a first batch are
not in the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shared.arms import ENGINE, home_of
from noria.evals.named.embedded import as_asked
from noria.evals.questions import Question, content_of
from noria.registry import Registry
from noria.sampling import Drawing, SamplingPool
from noria.scenes import draw, scene_questions
from noria.scenes.asked import JUDGED_KINDS
from noria.scenes.drawn.words import HELD_OUT
from noria.settings import Settings
from noria.store import Store
from tests.flow.policies import write_lora
from tests.servers import start_server
from train.pipeline.lineage import Parent, find_parent, live_version

SEED = 91_000
Seen = tuple[float, float]
"""Samples and tokens a second."""


def parent_of(home: Path) -> Parent:
    """The live version with its master."""
    settings = Settings(home=home)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        return find_parent(registry, home, live_version(registry))


def asked_of(count: int) -> list[Question]:
    """So many questions, kinds in turn."""
    each = -(-count // len(JUDGED_KINDS))
    found = as_asked(scene_questions(HELD_OUT, SEED, each), "generation")
    return [found[number % len(JUDGED_KINDS) * each + number // len(JUDGED_KINDS)] for number in range(count)]


def by_engine(home: Path, lora: Path, asked: argparse.Namespace) -> Seen:
    """Groups from a server of its own."""
    drawing = Drawing(n=asked.group, max_tokens=asked.tokens, seed=1)
    prompts = [[{"role": "user", "content": content_of(one)}] for one in asked_of(asked.prompts * (asked.batches + 1))]
    with start_server(home, **ENGINE) as server, SamplingPool([f"grpc://{server.grpc}"], concurrency=8) as pool:
        version = pool.version()
        pool.put_adapter("still-0", lora, version, ttl_s=86_400)

        def sampled(some: Sequence[list[dict[str, Any]]]) -> Iterator[int]:
            for group in pool.sample(some, drawing, adapter="still-0", version=version):
                if group.error is not None:
                    raise SystemExit(f"the engine refused a prompt: {group.error}")
                yield from (len(one.token_ids) for one in group.samples)

        return _timed(sampled, prompts, asked.prompts)


def by_trl(parent: Parent, asked: argparse.Namespace, dtype: str) -> Seen:
    """Generation batches of TRL's trainer over the model that would train."""
    trainer, scratch = _trainer(parent, asked, dtype)

    def generated(some: Sequence[Question]) -> Iterator[int]:
        for start in range(0, len(some), asked.prompts):
            turns = [_shown(one) for one in some[start : start + asked.prompts] for _ in range(asked.group)]
            ids, pictures, fields = trainer._tokenize_prompts(turns)
            answers, _ = trainer._generate_single_turn(ids, pictures, fields, asked.group)
            yield from map(len, answers)

    with scratch:
        return _timed(generated, asked_of(asked.prompts * (asked.batches + 1)), asked.prompts)


def _timed(answer: Callable[[Any], Iterator[int]], prompts: Sequence[Any], first: int) -> Seen:
    """The first prompts warm up; the others are timed. `answer` gives each sample's tokens."""
    list(answer(prompts[:first]))
    began = time.monotonic()
    tokens = list(answer(prompts[first:]))
    seconds = time.monotonic() - began
    return len(tokens) / seconds, sum(tokens) / seconds


def _shown(one: Question) -> list[dict[str, Any]]:
    """As TRL wants a conversation with a picture."""
    (picture,) = one.pictures
    parts = [{"type": "image", "image": draw(picture.ref)}, {"type": "text", "text": one.prompt}]
    return [{"role": "user", "content": parts}]


def _trainer(parent: Parent, asked: argparse.Namespace, dtype: str) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """TRL's trainer as it is, over a LoRA of the language model; its folder."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from noria.module_settings import ModulePolicies
    from train.methods.policies import apply_policies
    from train.methods.policy_model import load_policy, load_processor, read_architecture

    architecture = read_architecture(parent.master)
    model = load_policy(parent.master, parent.adapters, architecture, getattr(torch, dtype))
    applied = apply_policies(model, architecture, ModulePolicies().resolved())
    scratch = tempfile.TemporaryDirectory()
    config = GRPOConfig(
        output_dir=scratch.name,
        per_device_train_batch_size=asked.prompts * asked.group,
        num_generations=asked.group,
        max_completion_length=asked.tokens,
        temperature=1.0,
        beta=0.0,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=applied.model,
        reward_funcs=lambda **columns: [0.0 for _ in columns["prompts"]],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        processing_class=load_processor(parent.master),
    )
    trainer.model.train()
    return trainer, scratch


def show(seen: dict[str, list[Seen]], asked: argparse.Namespace) -> None:
    """Medians over the rounds, and how many times TRL's."""
    table = Table(title=f"groups of {asked.group} x up to {asked.tokens} tokens, {asked.prompts} prompts at a time")
    for column in ("way", "samples/s", "tokens/s", "the engine's, times"):
        table.add_column(column, justify="left" if column == "way" else "right")
    medians = {way: [statistics.median(one) for one in zip(*rounds, strict=True)] for way, rounds in seen.items()}
    ours = medians["the serving engine"][0]
    for way, (samples, tokens) in medians.items():
        table.add_row(way, f"{samples:.2f}", f"{tokens:.1f}", f"{ours / samples:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, help="a home whose live version is sampled; default: the embedded model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4, help="generation batches of a round (default 4)")
    parser.add_argument("--prompts", type=int, default=8, help="groups in a batch (default 8)")
    parser.add_argument("--group", type=int, default=8, help="samples of a group (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="longest sample, in tokens (default 32)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = home_of(asked.home, Path(scratch) / "home")
        parent = parent_of(home)
        lora = write_lora(parent.serving, Path(scratch) / "lora", 0, strength=0.0)
        ways: dict[str, Callable[[], Seen]] = {
            "the serving engine": lambda: by_engine(home, lora, asked),
            "TRL's generation, float32": lambda: by_trl(parent, asked, "float32"),
            "TRL's generation, bfloat16": lambda: by_trl(parent, asked, "bfloat16"),
        }
        seen: dict[str, list[Seen]] = {way: [] for way in ways}
        for turn in range(asked.rounds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                seen[way].append(ways[way]())
        show(seen, asked)


if __name__ == "__main__":
    main()
