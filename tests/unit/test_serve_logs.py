"""Log lines: an event and its keys."""

from __future__ import annotations

import logging

from serve.logs import KeyedFormatter


def test_a_line_holds_the_event_and_its_keys() -> None:
    record = logging.makeLogRecord(
        {"name": "noria.release", "levelname": "INFO", "msg": "rolled_out", "model_version": "v2", "pause_s": 1.5}
        | {"reason": "two words", "job_id": None}
    )
    line = KeyedFormatter().format(record)
    assert line.endswith('INFO noria.release rolled_out model_version=v2 pause_s=1.5 reason="two words" job_id=null')
