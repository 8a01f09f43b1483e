"""The job's folder: small JSON written whole, linked copies, sizes, and what is thrown away at the end.

Comes in: paths. Goes out: files that are complete or absent. Must not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from noria.records import Json

LARGE = ("merged", "serving", "staging")  # full models; gone when a job ends


def write_json(path: Path, value: Json) -> None:
    """Writes beside, flushes, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def read_json(path: Path) -> Json | None:
    """The value, or None where there is no such file."""
    try:
        value: Json = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return value


def once(receipt: Path, produce: Callable[[], Json]) -> Json:
    """Runs `produce` unless its receipt exists, then writes what it returned as the receipt.

    This is what makes a stage done or not: the receipt comes after everything that the stage wrote.
    """
    done = read_json(receipt)
    if done is None:
        done = produce()
        write_json(receipt, done)
    return done


def remove(path: Path) -> None:
    """Removes a folder or file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_tree(source: Path, out: Path) -> None:
    """A copy of a folder that shares its files' bytes where the file system can: nobody changes them after."""
    shutil.copytree(source, out, copy_function=_link)


def folder_bytes(folder: Path) -> int:
    """Size of every file below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clean(folder: Path, keep_merged: bool) -> None:
    """Removes the large working files, and what was cut off half-way; the small ones stay for inspection."""
    for name in LARGE:
        remove(folder / f"{name}.tmp")
        if not (keep_merged and name == "merged"):
            remove(folder / name)
    for scratch in folder.glob(".trl-*"):
        remove(scratch)


def _link(source: str, out: str) -> None:
    try:
        os.link(source, out)
    except OSError:
        shutil.copy2(source, out)
