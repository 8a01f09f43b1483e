"""`python -m train model ...`: add a checkpoint, build the embedded model, list masters.

Comes in: arguments. Goes out: progress on stderr, the result on stdout (one line, or JSON), an exit code.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from noria.records import Json
from noria.registry import Manifest, Registry
from noria.settings import Settings, load_settings
from noria.store import Store
from train.models.add import Progress, add_model
from train.models.embedded.build import build_embedded

STAGES = {
    "copy": "take the checkpoint in",
    "download": "download SmolLM2",
    "assemble": "assemble the model",
    "quantize": "quantize (GPTQ)",
    "verify": "verify the artefact",
    "publish": "publish",
}
_CHATTY = ("torchao", "torch.utils._pytree")  # torchao, which gptqmodel imports, warns of GPU kernels on a CPU


def main(argv: Sequence[str]) -> int:
    """Runs `add PATH [--name N]`, `embedded` or `list`. Raises NoriaError, which the caller prints."""
    arguments = _parser().parse_args(argv)
    settings = load_settings()
    if arguments.command == "list":
        return _print_masters(settings, arguments.json)
    settings.home.mkdir(parents=True, exist_ok=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with Store.open(settings.store_url) as store, stage_bars() as progress:
        registry = Registry(settings.models_dir, store)
        if arguments.command == "add":
            manifest = add_model(arguments.source, registry, settings, arguments.name, progress)
        else:
            manifest = build_embedded(registry, settings, progress)
        live = registry.live()
    _print_version(manifest, live, arguments.json)
    return 0


@contextmanager
def stage_bars() -> Iterator[Progress]:
    """A rich bar for each stage on stderr; where stderr is no terminal, one line when a stage begins and ends."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        done: set[str] = set()

        def progress(stage: str, share: float) -> None:
            label = STAGES.get(stage, stage)
            if stage not in tasks:
                tasks[stage] = bars.add_task(label, total=1.0)
                if not console.is_terminal:
                    sys.stderr.write(f"{label} ...\n")
            bars.update(tasks[stage], completed=share)
            if share >= 1.0 and stage not in done:
                done.add(stage)
                bars.stop_task(tasks[stage])
                if not console.is_terminal:
                    sys.stderr.write(f"{label}: done in {bars.tasks[tasks[stage]].elapsed or 0.0:.0f} s\n")

        yield progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="noria model", description="Take a model in: quantise, verify, publish.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="a folder with a full-precision or GPTQ checkpoint")
    add.add_argument("source", type=Path, help="the checkpoint's folder")
    add.add_argument("--name", help="its name under masters/; the folder's own if not given")
    embedded = commands.add_parser("embedded", help="build the embedded model, once")
    listed = commands.add_parser("list", help="the masters of this home")
    for command in (add, embedded, listed):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _print_version(manifest: Manifest, live: str | None, as_json: bool) -> None:
    shown: Json = {**manifest.record("live" if live == manifest.id else "candidate").to_wire(), "live": live}
    if as_json:
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    base = manifest.base.name if manifest.base is not None else "?"
    state = "live" if live == manifest.id else f"published; `noria rollout {manifest.id}` puts it live"
    sys.stdout.write(f"{manifest.id} of {base}: {state}\n")


def _print_masters(settings: Settings, as_json: bool) -> int:
    folders = sorted(p for p in settings.masters_dir.glob("*") if p.is_dir() and not p.name.startswith("."))
    rows: list[Json] = [
        {"name": folder.name, "bytes": sum(f.stat().st_size for f in folder.rglob("*"))} for folder in folders
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        sys.stdout.write("".join(f"{row['name']}\t{row['bytes'] / 1e9:.2f} GB\n" for row in rows))
    return 0
