"""`python -m train model ...`: add a checkpoint, build the embedded model or its eyes, list masters.

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

from noria.access.audit import by_os_user
from noria.records import Json
from noria.registry import Manifest, Registry
from noria.settings import Settings, load_settings
from noria.store import Store
from train.models.add import Progress, add_model
from train.models.embedded.build import build_embedded
from train.models.embedded.eyes.card import write_card
from train.models.embedded.eyes.export import export_eyes
from train.models.embedded.eyes.record import CARD, FILES, Eyes

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
    """Runs one subcommand; `--help` lists them. Raises NoriaError, which the caller prints."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "card":
        return _write_card(arguments)
    settings = load_settings()
    if arguments.command == "list":
        return _print_masters(settings, arguments.json)
    settings.home.mkdir(parents=True, exist_ok=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.command == "build-embedded":
        return _rebuild(settings, arguments)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        if arguments.command == "eyes":
            print_eyes(export_eyes(arguments.version, registry, settings, arguments.out), arguments.json)
            return 0
        with by_os_user(store, "add_model") as noted, stage_bars() as progress:
            if arguments.command == "add":
                manifest = add_model(arguments.source, registry, settings, arguments.name, progress)
            else:
                manifest = build_embedded(registry, settings, progress)
            noted.target = manifest.id
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
    rebuilt = commands.add_parser("build-embedded", help="train the embedded model's eyes anew")
    rebuilt.add_argument("--out", type=Path, help="where the eyes go; NORIA_HOME/eyes if not given")
    rebuilt.add_argument("--recipe", type=Path, help="another recipe than that of the shipped eyes")
    eyes = commands.add_parser("eyes", help="take the eyes out of a version that their recipe made")
    eyes.add_argument("version", help="the version's id")
    eyes.add_argument("--out", type=Path, required=True, help="where the eyes go")
    card = commands.add_parser("card", help="write the model card of an eyes folder anew")
    card.add_argument("folder", type=Path, help="the eyes folder")
    told = "what `noria eval VERSION --json` printed"
    card.add_argument("--scores", type=Path, action="append", default=[], help=f"{told}, of a version with the eyes")
    card.add_argument("--plain", type=Path, action="append", default=[], help=f"{told}, of the blank model's")
    card.add_argument("--perplexity", type=Path, help='a file with {"text", "tokens", "plain", "eyes"}')
    listed = commands.add_parser("list", help="the masters of this home")
    for command in (add, embedded, rebuilt, eyes, listed):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _rebuild(settings: Settings, arguments: argparse.Namespace) -> int:
    from train.models.embedded.rebuild import rebuild, recipe_to_run

    out = arguments.out if arguments.out is not None else settings.home / "eyes"
    rebuilt = rebuild(settings, recipe_to_run(arguments.recipe), out.resolve(), stage_bars)
    if rebuilt.eyes is not None:
        print_eyes(rebuilt.eyes, arguments.json)
    return rebuilt.status


def print_eyes(eyes: Eyes, as_json: bool) -> None:
    """What was written, and of which version."""
    record = eyes.record
    files = {path.name: path.stat().st_size for path in sorted(eyes.folder.iterdir()) if path.name in FILES}
    if as_json:
        shown = {"out": str(eyes.folder), "files": files, **record.model_dump(mode="json", exclude={"recipe"})}
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    seconds = sum(stage.seconds for stage in record.stages)
    sys.stdout.write(f"{eyes.folder}: the eyes of {record.version}, trained in {seconds:.0f} s\n")
    sys.stdout.write("".join(f"  {name}  {size} bytes\n" for name, size in files.items()))


def _write_card(arguments: argparse.Namespace) -> int:
    scores = write_card(arguments.folder, arguments.scores, arguments.plain, arguments.perplexity)
    told = "nothing is measured yet" if scores is None else f"measured: {', '.join(scores.measured) or 'no set'}"
    sys.stdout.write(f"{arguments.folder / CARD} written; {told}\n")
    return 0


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
