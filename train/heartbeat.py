"""The trainer's pulse: a thread that says the process is alive, renews the job's lease, and hears of cancellation.

Comes in: the store. Goes out: heartbeats; and `check()`, which long work calls to learn that it must stop.
Must not import torch.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from noria.errors import LeaseLost, NoriaError
from noria.records import ProcessInfo
from noria.store import Store
from train.log import EventLog

SHUTDOWN = "shutdown"
CANCELLED = "cancelled"
BEAT_S = 5.0  # the server believes a process for 15 s


class Heartbeat:
    """Beats from `start` to `stop`. `stopping` is set by the daemon's signal handler."""

    def __init__(self, store: Store, owner: str, lease_s: float, stopping: threading.Event, log: EventLog) -> None:
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._stopping = stopping
        self._log = log
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._job_id: str | None = None
        self._lost: LeaseLost | None = None
        self._renewed_at = time.monotonic()
        self._idle_reason: str | None = "idle: starting"
        self.failures = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and takes the process off the list."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=10)
        self._store.forget_process(self._owner)

    def idle(self, reason: str | None) -> None:
        """No job now, for this reason."""
        with self._lock:
            changed = reason != self._idle_reason or self._job_id is not None
            self._job_id, self._idle_reason = None, reason
        if changed:
            self._wake.set()

    def work(self, job_id: str) -> None:
        """The job that was just claimed."""
        with self._lock:
            self._job_id, self._idle_reason, self._lost = job_id, None, None
            self._renewed_at = time.monotonic()
        self._wake.set()

    def check(self) -> None:
        """Raises LeaseLost when the work must stop: code `shutdown`, `cancelled`, or `lease_lost`."""
        if self._stopping.is_set():
            raise LeaseLost("the trainer is stopping", code=SHUTDOWN)
        with self._lock:
            lost, silent_s = self._lost, time.monotonic() - self._renewed_at
            working = self._job_id is not None
        if lost is not None:
            raise lost
        if working and silent_s > self._lease_s:
            raise LeaseLost(f"the lease could not be renewed for {silent_s:.0f} s")

    def _run(self) -> None:
        interval_s = min(self._lease_s / 3, BEAT_S)
        while not self._ended.is_set():
            self._wake.clear()
            try:
                self._beat()
            except NoriaError as error:
                self.failures += 1
                self._log.event("heartbeat_failed", error=error.message, failures=self.failures)
            except Exception as error:  # noqa: BLE001 - a thread's edge: a pulse that dies would cost the job its lease
                self.failures += 1
                self._log.event("heartbeat_failed", error=repr(error), failures=self.failures)
            self._wake.wait(interval_s)

    def _beat(self) -> None:
        with self._lock:
            job_id, reason, lost = self._job_id, self._idle_reason, self._lost
        info = {"idle_reason": reason, "job": job_id, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.beat(ProcessInfo(self._owner, "trainer", time.time(), info))
        if job_id is None or lost is not None:
            return
        try:
            self._store.heartbeat(job_id, self._owner, self._lease_s)
        except LeaseLost as error:
            with self._lock:
                if self._job_id == job_id:
                    self._lost = error
            return
        with self._lock:
            if self._job_id == job_id:
                self._renewed_at = time.monotonic()
