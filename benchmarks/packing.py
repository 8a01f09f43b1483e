"""Tokens per second of supervised training: packed, grouped by length, padded, and TRL's SFTTrainer on the same file.

Comes in: a checkpoint (default: a random LLaVA of 5M parameters, built here). Goes out: a table of tokens/s and ratios.
All four train the same LoRA on the language model over the same rows, tower and aligner frozen, in float32 on a CPU,
without gradient checkpointing; a token is one of a row, pictures' tokens included and padding not. They run one after
the other, in alternating order, so that a machine that drifts favours none. The time is that of `train()`: reading
pictures, rendering and collating are in it, loading the model is not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from rich.table import Table

from noria.module_settings import ModulePolicies
from noria.modules import Architecture
from noria.recipes import DataSource, RecipeStage
from tests.tiny import build_tiny_vlm
from train.data.encode import Encoder
from train.data.samples import Sample
from train.data.sources import ImageLoader, read
from train.methods.policies import apply_policies
from train.methods.policy_model import load_policy, load_processor, read_architecture
from train.stages.language import LanguageTask, measure
from train.stages.trainer import StageTrainer, StageWatch

RANK = 8
RATE = 1e-4
LIMIT = 1024
TURNS = 5
WAYS = ("packed", "grouped", "padded", "TRL")


@dataclass(frozen=True)
class Setup:
    """What every way trains on: `file` has the rows, `lengths` their tokens; `batch` is samples a step."""

    master: Path
    file: Path
    lengths: list[int]
    batch: int

    @property
    def budget(self) -> int:
        """Tokens of a packed row: about as many samples as a batch has."""
        mean = sum(self.lengths) / len(self.lengths)
        return max(math.ceil(self.batch * mean / 64) * 64, max(self.lengths))


def write_rows(folder: Path, count: int, seed: int = 0) -> Path:
    """Dialogues of 1 to TURNS questions about drawn scenes, in TRL's prompt and completion, which both sides read."""
    file = folder / "rows.jsonl"
    load = ImageLoader(named=True)
    with file.open("w") as sink:
        for number, one in enumerate(read(DataSource(source="scenes", count=count, seed=seed), "sft")):
            sample = cast(Sample, one)
            load(sample.images[0]).save(folder / f"{number}.png")
            some = sample.messages[: 2 * (1 + number % TURNS)]
            turns = [{"role": turn["role"], "content": _words(turn["content"])} for turn in some]
            row = {"prompt": turns[:-1], "completion": turns[-1:], "images": [f"{number}.png"]}
            sink.write(json.dumps(row) + "\n")
    return file


def ours(setup: Setup, scratch: Path, *, packing: bool, grouped: bool) -> Callable[[], Any]:
    """Our stage of kind `sft`, ready to train."""
    stage = RecipeStage(
        name="bench",
        kind="sft",
        data=(DataSource(source=str(setup.file)),),
        modules=ModulePolicies.model_validate(
            {"aligner": "frozen", "language_model": {"policy": "lora", "rank": RANK, "learning_rate": RATE}}
        ),
        epochs=1,
        batch_size=1 if packing else setup.batch,
        micro_batch_size=1 if packing else setup.batch,
        max_length=setup.budget if packing else LIMIT,
        packing=packing,
        group_by_length=grouped,
        checkpoint_every=10**6,
    )
    samples = cast("list[Sample]", read(stage.data[0], "sft"))
    processor, load = load_processor(setup.master), ImageLoader(named=True)
    measured = measure(processor, samples, load, stage, scratch / "measured.json")
    architecture = read_architecture(setup.master)
    transformers.set_seed(stage.seed)
    model = load_policy(setup.master, (), architecture, torch.float32)
    applied = apply_policies(model, architecture, stage.policies, checkpointing=False)
    task = LanguageTask(applied, processor, samples, load, stage, measured)
    watch = StageWatch(lambda step: None, lambda: None)
    return cast("Callable[[], Any]", StageTrainer(task, task.plan, stage, scratch / "ours", watch).train)


def plain_trl(setup: Setup, scratch: Path) -> Callable[[], Any]:
    """TRL's trainer as its documentation shows it for pictures, ready to train."""
    import datasets
    import trl
    from peft import LoraConfig

    rows = [json.loads(line) for line in setup.file.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(setup.file.parent / name) for name in row["images"]]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    architecture = read_architecture(setup.master)
    model = load_policy(setup.master, (), architecture, torch.float32)
    config = trl.SFTConfig(
        output_dir=str(scratch / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=setup.batch,
        learning_rate=RATE,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=10**6,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=load_processor(setup.master),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_targets(model, architecture)),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return cast("Callable[[], Any]", trainer.train)


def speed(way: str, setup: Setup) -> float:
    """Tokens per second of one pass over the rows."""
    mine = partial(ours, packing=way == "packed", grouped=way == "grouped")
    build = plain_trl if way == "TRL" else mine
    with tempfile.TemporaryDirectory() as scratch:
        train = build(setup, Path(scratch))
        started = time.perf_counter()
        train()
        return sum(setup.lengths) / (time.perf_counter() - started)


def prepare(folder: Path, master: Path | None, count: int, batch: int) -> Setup:
    """Model, rows and their lengths."""
    if master is None:
        size = {"hidden": 256, "layers": 4, "heads": 4, "image_size": 96, "patch_size": 16}
        master = build_tiny_vlm(folder / "model", **size)  # type: ignore[arg-type]
    file = write_rows(folder, count)
    samples = cast("list[Sample]", read(DataSource(source=str(file)), "sft"))
    encoder = Encoder(load_processor(master), ImageLoader(named=True), LIMIT)
    return Setup(master, file, encoder.measure(samples).lengths, batch)


def show(setup: Setup, seen: dict[str, list[float]]) -> None:
    """The table: speeds, and packed over each other way, pair by pair."""
    longest, mean = max(setup.lengths), statistics.mean(setup.lengths)
    title = f"tokens/s, {len(setup.lengths)} samples of {mean:.0f} tokens (longest {longest}), batch {setup.batch}"
    table = Table(title=f"{title}, rows of {setup.budget}")
    for column in ("", "tokens/s, each pair", "packed over it, each pair", "median"):
        table.add_column(column, justify="right")
    for way in WAYS:
        ratios = [packed / other for packed, other in zip(seen["packed"], seen[way], strict=True)]
        cells = (", ".join(f"{one:.0f}" for one in seen[way]), ", ".join(f"{one:.2f}" for one in ratios))
        table.add_row(way, *cells, f"{statistics.median(ratios):.2f}")
    Console().print(table)


def main() -> None:
    """Runs the pairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: a random LLaVA, built here)")
    parser.add_argument("--samples", type=int, default=128, help="rows, seen once a measurement (default 128)")
    parser.add_argument("--batch", type=int, default=8, help="samples a step (default 8)")
    parser.add_argument("--pairs", type=int, default=3, help="how often each way is measured (default 3)")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seen: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(Path(folder), asked.model, asked.samples, asked.batch)
        for way in WAYS:
            speed(way, setup)  # warm-up: first calls compile kernels and fill caches
        for turn in range(asked.pairs):
            for way in WAYS if turn % 2 == 0 else reversed(WAYS):
                seen[way].append(speed(way, setup))
    show(setup, seen)


def _words(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _targets(model: Any, architecture: Architecture) -> list[str]:
    names = architecture.lm_linears([name for name, _ in model.named_parameters()], "hf")
    return sorted(name.removesuffix(".weight") for name in names)


if __name__ == "__main__":
    main()
