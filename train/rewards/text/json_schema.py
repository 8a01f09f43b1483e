"""Reward `json_schema`: whether a text is JSON that a schema accepts.

Comes in: samples. Goes out: 1, `parsed` for JSON of another shape, or 0. Must not import torch or `serve`.

Checked by jsonschema (drafts 3 to 2020-12) in a process with a time limit, since a schema's `pattern` can be made to
backtrack without end by the text that it is tried on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from noria.errors import SettingsError
from noria.rewards import JsonSchemaOptions
from train.rewards.outside.process import FunctionProcess
from train.rewards.protocol import Sample, Value

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
_START_S = 60.0


class JsonSchemaReward:
    """Checks texts. Raises SettingsError where the schema is none, or its file cannot be read."""

    name = "json_schema"

    def __init__(self, options: JsonSchemaOptions) -> None:
        schema = options.definition if options.file is None else _read(options.file)
        require_schema(schema)
        self._process = FunctionProcess(
            "train.rewards.text.json_schema:check",
            timeout_s=options.timeout_s,
            start_timeout_s=_START_S,
            arguments={"schema": schema, "parsed": options.parsed, "fenced": options.fenced},
        )

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        return [self._process(sample) for sample in samples]

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def check(sample: Sample, schema: Any, parsed: float, fenced: bool) -> float:
    """One text's value."""
    text = sample.text
    if fenced and (inside := _FENCE.fullmatch(text)):
        text = inside.group(1)
    try:
        value = json.loads(text, parse_constant=_refuse)  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if _validator(schema).is_valid(value) else parsed


def require_schema(schema: Any) -> None:
    """Raises SettingsError, saying where, for what is no JSON Schema."""
    from jsonschema.exceptions import SchemaError

    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.path)) or "its top"
        raise SettingsError(f"not a JSON Schema at {where}: {error.message}", param="definition") from error


def _validator(schema: Any) -> Any:
    from jsonschema import validators
    from referencing.jsonschema import EMPTY_REGISTRY

    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    return kind(schema, registry=EMPTY_REGISTRY)  # else it would fetch a $ref from the network


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"the schema in {file} cannot be read: {error}", param="file") from error
