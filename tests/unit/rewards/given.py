"""Functions that the tests hand to the reward `python`: good ones, and every way to go wrong."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from train.rewards import Sample

STARTED = time.monotonic()
THING = 3


def length(sample: Sample) -> float:
    """How long the text is."""
    return float(len(sample.text))


def told(sample: Sample) -> float:
    """1 when every field has arrived as it was sent."""
    prompt = [{"role": "user", "content": [{"type": "text", "text": "hé"}]}]
    return float(sample == Sample(prompt, "x", "length", ("a", "b"), {"options": ["c"]}, 7))


def by_text(sample: Sample) -> Any:
    """Does what the text says."""
    match sample.text:
        case "raise":
            raise ValueError("with the text in it")
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(3)
        case "hang":
            time.sleep(600)
        case "hang in C":
            return float(re.match(r"(a|aa)+$", "a" * 100 + "!") is not None)
        case "hang for good":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            time.sleep(600)
        case "close":
            os.closerange(3, 64)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            time.sleep(600)
        case "print":
            print("noise", flush=True)
            os.write(1, b"more noise\n")
        case "read":
            return float(len(sys.stdin.read()))
    values = {"none": None, "text": "1.0", "list": [1.0], "nan": float("nan"), "true": True, "huge": 10**400}
    return values.get(sample.text, 1.0)


def leaves(sample: Sample) -> float:
    """Starts a process of its own, writes down its number, and hangs."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    Path(sample.text).write_text(str(child))
    time.sleep(600)
    return 0.0


def process(sample: Sample) -> float:
    """Which process this is."""
    time.sleep(0.05)
    return float(os.getpid())
