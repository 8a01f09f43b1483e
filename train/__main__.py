"""`python -m train`: the trainer daemon; `... run RECIPE`: one recipe, here and now; `... model ...`: models are added;
`... rewards`: samples are scored.

Comes in: the settings tree and arguments. Goes out: an exit code. Niceness and thread counts are set here, before
anything imports torch, because OpenMP reads them once. Must not import torch, nor anything that does, at the top.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from noria.errors import NoriaError, wire_of
from noria.settings import Settings, load_settings

USAGE = """usage: python -m train            run the trainer daemon
       python -m train run ...    train by a recipe
       python -m train model ...  add a model
       python -m train rewards .. score samples
"""


def prepare_process(settings: Settings) -> None:
    """Threads that sleep while they wait (a busy-waiting trainer starves the engine beside it), and no network."""
    threads = settings.train.threads
    count = str(threads or len(os.sched_getaffinity(0)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GPTQMODEL_CPU_WORKERS"):
        if threads is not None:
            os.environ[name] = count
        else:
            os.environ.setdefault(name, count)
    for name, value in {
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; errors made on purpose end in one line and their exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in ("model", "rewards", "run"):
        sys.stderr.write(USAGE)
        return 0 if arguments[0] in ("-h", "--help") else 2
    try:
        settings = load_settings()
        prepare_process(settings)
        if arguments[:1] == ["run"]:
            from train.run import main as run_main

            os.nice(settings.train.nice)
            return run_main(settings, arguments[1:])
        if arguments[:1] == ["rewards"]:
            from train.rewards.cli import main as rewards_main

            return rewards_main(settings, arguments[1:])
        if arguments:
            from train.models.cli import main as model_main

            return int(model_main(arguments[1:]))
        os.nice(settings.train.nice)
        from train.daemon import run_daemon

        return run_daemon(settings)
    except NoriaError as error:
        sys.stderr.write(f"noria train: {error.message}\n")
        return wire_of(error).exit_code


if __name__ == "__main__":
    sys.exit(main())
