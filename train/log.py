"""What the trainer says on stderr: one line an event, JSON for machines, words for a terminal; never prompts.

Comes in: event names and keys. Goes out: lines on a stream, and a rich progress bar on a terminal only.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class EventLog:
    """Writes events; safe from several threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()
        self._terminal = self._stream.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def terminal(self) -> bool:
        """Whether a person watches: then there is a progress bar."""
        return self._terminal

    def event(self, event: str, **keys: Any) -> None:
        """One line, for example `event("stage", job_id=.., stage="train")`."""
        with self._lock:
            if self._terminal:
                told = "  ".join(f"{key}={value}" for key, value in keys.items() if value is not None)
                line = f"{time.strftime('%H:%M:%S')} trainer {event}  {told}"
                self._print(line)
            else:
                self._print(json.dumps({"at": round(time.time(), 3), "part": "trainer", "event": event, **keys}))

    def progress(self, label: str, fraction: float) -> None:
        """Moves the bar, on a terminal; elsewhere nothing."""
        if not self._terminal:
            return
        with self._lock:
            if self._progress is None:
                columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
                self._progress = Progress(*columns, console=Console(file=self._stream), transient=True)
                self._task = self._progress.add_task(label, total=1.0)
                self._progress.start()
            if self._task is not None:
                self._progress.update(self._task, description=label, completed=fraction)

    def end_progress(self) -> None:
        """Takes the bar away."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
                self._task = None

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)
