"""The command `noria doctor`.

Comes in: the home, the machine. Goes out: a line a check; exit status 1 when one fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import typer

from noria.cli.context import AsJson, Place, place, print_json

app = typer.Typer()
PROBE_S = 180
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@app.command(epilog="Example: noria doctor --json")
def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Proves the installation: Python, packages, torch, torchvision, vLLM, kernels, disk, memory. Fails with a cure."""
    found = examine(place(ctx))
    failed = [one for one in found if one.state == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [dataclasses.asdict(one) for one in found]})
    else:
        for one in found:
            typer.echo(f"{MARKS[one.state]}  {one.name.ljust(13)}  {one.detail}")
            if one.fix:
                typer.echo(f"{' ' * 21}{one.fix}")
        typer.echo(f"{len(failed)} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed")
    if failed:
        raise typer.Exit(1)


def examine(here: Place) -> list[Any]:
    """All checks, in the order in which one rests on another. Raises SettingsError when the settings are wrong."""
    from noria.cli.doctor import checks

    home = here.settings().home
    gpu = checks.has_gpu()
    seen = probe()
    return [
        checks.python(),
        checks.packages("gpu" if gpu else "cpu"),
        checks.cuda_packages(gpu),
        checks.torch(seen["torch"], gpu),
        checks.torchvision(seen["torchvision"]),
        checks.vllm(seen["vllm"], gpu),
        checks.kernels(seen["kernels"]),
        checks.disk(home),
        checks.memory(),
        checks.cores(),
    ]


def probe() -> dict[str, dict[str, Any]]:
    """What a process of its own saw of torch, torchvision, vLLM and the kernels."""
    from noria.cli.doctor.probe import PARTS, PREFIX

    command = [sys.executable, "-m", "noria.cli.doctor.probe"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, env=environment, capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {name: {"error": f"importing it took more than {PROBE_S} s"} for name in PARTS}
    for line in done.stdout.splitlines():
        if line.startswith(PREFIX):
            seen: dict[str, dict[str, Any]] = json.loads(line.removeprefix(PREFIX))
            return seen
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {name: {"error": f"the probe ended with status {done.returncode}: {last}"} for name in PARTS}
