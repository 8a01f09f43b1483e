"""How much memory a server's processes hold, as Linux tells.

Comes in: a process id. Goes out: MiB. Reads /proc alone.
"""

from __future__ import annotations

from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all that it started, and what those started."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += family(int(child))
    return found


def rss_mib(pid: int) -> float:
    """Resident memory of one process; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def family_mib(pid: int) -> float:
    """Resident memory of a process and its children; pages that they share count more than once."""
    return sum(rss_mib(one) for one in family(pid))
