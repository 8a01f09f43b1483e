"""One stage in several processes: started here, followed by their log, and the module that each of them runs.

Comes in: a `StageRun` with `processes` or `accelerate_config`. Goes out: the report of the first process.
Without a configuration torch's launcher starts them, with gloo on CPUs and NCCL on GPUs; with one, `accelerate launch`
does, for FSDP, DeepSpeed and more machines. Must not import `serve`; torch only in the processes themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from noria.errors import NoriaError, TrainingError
from noria.records import Json
from train.pipeline.files import read_json, remove, write_json
from train.stages.spec import LOG, StageRun, Step

if TYPE_CHECKING:
    from train.stages.run import Listener

SPEC, RESULT, TABLE, ERROR, OUTPUT = "run.json", "result.json", "table.json", "error.json", "processes.log"
_POLL_S = 0.2
_TAIL = 2000  # characters of what a process printed before it died
_STOP_S = 20.0


def train_in_processes(run: StageRun, listener: Listener) -> Json:
    """Runs the stage and returns its report; stops every process when the listener says so or one of them fails."""
    for name in (RESULT, TABLE, ERROR):
        remove(run.folder / name)
    write_json(run.folder / SPEC, run.to_json())
    with (run.folder / OUTPUT).open("w") as output:
        started = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
            command(run), env=environment(run), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _follow(run, started, listener)
        finally:
            _stop(started)
    result = read_json(run.folder / RESULT)
    if result is None or started.returncode:
        raise _failure(run, started.returncode)
    return result


def command(run: StageRun) -> list[str]:
    """What starts the processes."""
    module = ["-m", "train.stages.processes", str(run.folder / SPEC)]
    count = str(run.processes)
    if run.accelerate_config is None:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *module]
    config = ["--config_file", str(run.accelerate_config), "--num_processes", count]
    return [sys.executable, "-m", "accelerate.commands.launch", *config, *module]


def environment(run: StageRun) -> dict[str, str]:
    """Ours, with the cores shared out and a folder named `train` where the user stands not taken for ours."""
    import torch

    cores = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
    told = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // run.processes)), "PYTHONSAFEPATH": "1"}
    return told if torch.cuda.is_available() else {**told, "ACCELERATE_USE_CPU": "true"}


def main(argv: Sequence[str]) -> int:
    """One of the processes: `python -m train.stages.processes SPEC`."""
    from train.stages.run import Listener, train_supervised

    run = StageRun.from_json(json.loads(Path(argv[0]).read_text()))
    first = os.environ.get("RANK", "0") == "0"
    try:
        listener = Listener(on_table=lambda table: write_json(run.folder / TABLE, {"table": table}))
        result = train_supervised(run, listener)
    except NoriaError as error:
        write_json(run.folder / ERROR, {"message": error.message, "code": error.code, "param": error.param})
        return 1
    if first:
        write_json(run.folder / RESULT, result)
    return 0


def _follow(run: StageRun, started: subprocess.Popen[bytes], listener: Listener) -> None:
    """Hands on the table and each new line of the log until the processes end."""
    log = run.folder / LOG
    at = log.stat().st_size if log.is_file() else 0
    table_told = False
    while True:
        ended = started.poll() is not None
        listener.check()
        table = None if table_told else read_json(run.folder / TABLE)
        if table is not None:
            table_told = True
            listener.on_table(table["table"])
        at = _new_steps(log, at, listener)
        if ended:
            return
        time.sleep(_POLL_S)


def _new_steps(log: Path, at: int, listener: Listener) -> int:
    if not log.is_file():
        return at
    with log.open("rb") as file:
        file.seek(at)
        for line in file:
            if not line.endswith(b"}\n"):
                break
            at += len(line)
            listener.on_step(Step(**json.loads(line)))
    return at


def _stop(started: subprocess.Popen[bytes]) -> None:
    if started.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_STOP_S)
            return


def _failure(run: StageRun, status: int) -> TrainingError:
    told = read_json(run.folder / ERROR)
    if told is not None:
        return TrainingError(told["message"], param=told["param"], code=told["code"])
    tail = (run.folder / OUTPUT).read_text(errors="replace")[-_TAIL:].strip()
    return TrainingError(f"stage {run.stage.name!r}: a training process ended with status {status}: {tail}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
