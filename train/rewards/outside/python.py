"""Reward `python`: a user's function, called in a process of its own.

Comes in: samples. Goes out: what the function returned; a failure for an exception, a hang, a wrong type.
Must not import torch or `serve`.

The function is `def reward(sample: train.rewards.Sample) -> float | None`; it is called for one sample at a time, so
that what goes wrong with one costs that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from noria.rewards import PythonOptions
from train.rewards.outside.process import FunctionProcess
from train.rewards.protocol import Sample, Value


class PythonReward:
    """Shares samples out over its processes. Raises SettingsError where the function cannot be imported."""

    name = "python"

    def __init__(self, options: PythonOptions) -> None:
        self._processes: list[FunctionProcess] = []
        try:
            for _ in range(options.processes):
                self._processes.append(
                    FunctionProcess(
                        options.function,
                        timeout_s=options.timeout_s,
                        start_timeout_s=options.start_timeout_s,
                        path=options.path,
                    )
                )
        except BaseException:
            self.close()
            raise

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """Whatever the function says."""
        waiting = iter(enumerate(samples))
        values: list[Value] = [None] * len(samples)

        def work(process: FunctionProcess) -> None:
            for at, sample in waiting:  # `next` of enumerate is one step of the interpreter: no two threads get one
                values[at] = process(sample)

        with ThreadPoolExecutor(len(self._processes), thread_name_prefix="reward") as pool:
            list(pool.map(work, self._processes))
        return values

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.close()
