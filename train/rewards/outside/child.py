"""`python -m train.rewards.outside.child`: calls one function, again and again, for the process that started this one.

Comes in: on standard input one JSON object a line: first `{"function", "path", "arguments"}`, then samples. Goes out:
on what was standard output one JSON object a line, for the start and for each sample: `{"value": number or null}`, or
`{"failed": reason}`. What the function prints goes to standard error.

A call that takes too long ends this process with SIGALRM, whose default action no Python code has to wait for: a C
function that never gives the interpreter back ends too, also when the process that started this one is gone.
Must not import torch or `serve`, nor anything heavy.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import IO, Any, TypeVar

from noria.records import Json
from train.rewards.protocol import Sample

Function = Callable[[Sample], Any]
Found = TypeVar("Found")


def main(timeout_s: float, start_timeout_s: float) -> None:
    """Answers until standard input ends. `timeout_s` bounds each call, `start_timeout_s` the function's import."""
    asked, told = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it closes our input
    with asked, told:
        found = _within(start_timeout_s, lambda: _start(json.loads(asked.readline())))
        if isinstance(found, str):
            _say(told, {"failed": found})
            return
        _say(told, {"value": None})
        for line in asked:
            sample = Sample.from_json(json.loads(line))
            _say(told, _within(timeout_s, partial(called, found, sample)))


def resolve(function: str, path: str | None) -> Callable[..., Any]:
    """What `module:function` names. Raises what its import raises, AttributeError, TypeError."""
    if path is not None:
        sys.path.insert(0, path)
    module, _, name = function.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{function} is a {type(found).__name__}, not a function")
    made: Callable[..., Any] = found
    return made


def called(function: Function, sample: Sample) -> Json:
    """The function's value as the asking process gets it. What it raises is told by its kind alone."""
    try:
        value = function(sample)
        if value is None:
            return {"value": None}
        if not isinstance(value, Real):
            return {"failed": f"returned {type(value).__name__}"}
        number = float(value)
        return {"value": number} if math.isfinite(number) else {"failed": "not finite"}
    except OverflowError:
        return {"failed": "not finite"}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the function is the user's; its failures are counted
        return {"failed": f"raised {type(error).__name__}"}


def _start(asked: Json) -> Function | str:
    """The function, or why there is none, in words for the operator who named it."""
    try:
        return partial(resolve(asked["function"], asked["path"]), **asked["arguments"])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - importing the user's module may raise anything
        return f"{type(error).__name__}: {error}"


def _within(seconds: float, work: Callable[[], Found]) -> Found:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _say(told: IO[str], what: Json) -> None:
    told.write(json.dumps(what) + "\n")
    told.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
