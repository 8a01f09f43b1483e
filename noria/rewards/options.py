"""The options of each reward.

Comes in: one entry of a `rewards` list. Goes out: a frozen model whose `name` says which reward it is. What can be
checked without the machinery behind a reward is checked here: a pattern that does not compile, a band that is upside
down. Must not import torch or train.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from noria.evals.questions import Metric
from noria.module_settings import Section

FeatureState = Literal["last", "mean", "both"]
_FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


class RewardOptions(Section):
    """What every reward has."""

    weight: float = Field(1.0, allow_inf_nan=False)
    """What its value is multiplied by in the total. Negative makes it a penalty; with 0 it is shown and not counted."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")
    """Its name in results and counts; none is the reward's name. Two entries of one name need two labels."""

    @model_serializer(mode="wrap")
    def _with_name(self, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A tree without defaults (a job keeps such a one) still has to say which reward this is."""
        return {"name": getattr(self, "name", None), **told(self)}

    @property
    def key(self) -> str:
        """The name under which values and failures are shown."""
        return self.label or str(getattr(self, "name", ""))


class ExactOptions(RewardOptions):
    """Whether the answer is a right one, measured as `noria eval` measures it."""

    name: Literal["exact"] = "exact"
    """The reward."""
    metric: Metric | None = None
    """A metric of `noria eval`; none is the row's own `metric`, else `choice` where it has `options`, else `exact`."""
    tolerance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """For `number`, absolute; none is the row's own `tolerance`, else 0."""
    extract: str | None = None
    """A pattern that finds the answer in the text: its first group (or all of it), of the last match. No match is 0."""
    timeout_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Longest search with `extract`, in seconds."""

    @field_validator("extract")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return value if value is None else compiled(value)


class RegexOptions(RewardOptions):
    """1 where a regular expression is found in the text, else 0."""

    name: Literal["regex"] = "regex"
    """The reward."""
    pattern: str
    """Python's syntax (`re`). `(?i)` in front ignores case, `(?s)` lets a dot match a line's end."""
    whole: bool = False
    """The whole text must match, not a part of it."""
    timeout_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Longest search in one text, in seconds."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return compiled(value)


class JsonSchemaOptions(RewardOptions):
    """1 where the text is JSON that its schema accepts."""

    name: Literal["json_schema"] = "json_schema"
    """The reward."""
    definition: dict[str, Any] | None = None
    """The JSON Schema itself (draft 2020-12, unless its `$schema` names another); either this or `file`."""
    file: Path | None = None
    """A file that holds the schema; read when the job starts."""
    parsed: float = Field(0.0, ge=0, le=1)
    """What JSON is worth that the schema does not accept."""
    fenced: bool = False
    """Take the JSON out of a Markdown code fence around it."""
    timeout_s: float = Field(2.0, gt=0, allow_inf_nan=False)
    """Longest check of one text, in seconds."""

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        if (self.definition is None) == (self.file is None):
            raise ValueError("say either definition or file, one of them")
        return self


class LengthOptions(RewardOptions):
    """1 for a length within a band, falling linearly to 0 on both sides."""

    name: Literal["length"] = "length"
    """The reward."""
    unit: Literal["tokens", "characters"] = "tokens"
    """What is counted. Tokens are those that were sampled, where the row says how many, else the tokenizer's."""
    low: int = Field(0, ge=0)
    """The shortest length that is worth 1."""
    high: int = Field(ge=0)
    """The longest length that is worth 1."""
    falloff: int = Field(0, ge=0)
    """How far outside the band the value reaches 0, in the same unit; 0 is a sharp edge."""

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class LanguageOptions(RewardOptions):
    """Whether the text is in one of the wanted languages (py3langid, offline)."""

    name: Literal["language"] = "language"
    """The reward."""
    languages: tuple[str, ...] = Field(min_length=1)
    """The wanted ones, as ISO 639-1 codes: `["en", "de"]`."""
    among: tuple[str, ...] | None = None
    """The languages that are told apart; none is every one with a two-letter code. Fewer are told apart better."""
    graded: bool = False
    """Give the wanted languages' probability, in place of 1 or 0 for the likeliest one."""
    min_letter_bytes: int = Field(20, ge=0)
    """A text whose letters are fewer bytes of UTF-8 says too little to tell its language by: 20 Latin letters, 7
    Chinese characters."""
    short: float = Field(1.0, ge=0, le=1)
    """What such a text is worth."""


class RepetitionOptions(RewardOptions):
    """1 for a text that repeats no n-gram, less by the share of those that it repeats."""

    name: Literal["repetition"] = "repetition"
    """The reward."""
    n: int = Field(3, ge=1)
    """Units in an n-gram."""
    unit: Literal["words", "characters"] = "words"
    """What an n-gram is made of; characters for languages that write no spaces."""
    allowed: float = Field(0.0, ge=0, lt=1)
    """Share of repeated n-grams that costs nothing."""


class JudgeOptions(RewardOptions):
    """A mark that a model gives, over any OpenAI-compatible address."""

    name: Literal["judge"] = "judge"
    """The reward."""
    url: str = Field(pattern=r"^https?://")
    """Where the API is, up to `/v1`: `http://127.0.0.1:8001/v1`."""
    model: str
    """The name of the model that judges."""
    rubric: str = Field(min_length=1)
    """What a good answer is, in words; the judge reads it before each answer."""
    lowest: float = Field(0.0, allow_inf_nan=False)
    """The mark that is worth 0."""
    highest: float = Field(10.0, allow_inf_nan=False)
    """The mark that is worth 1."""
    pictures: bool = True
    """Show the judge the prompt's pictures."""
    show_answers: bool = True
    """Tell the judge the right answers, where the row has some."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the API is asked for JSON; the answer is parsed strictly in any case."""
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_]\w*$")
    """The environment variable that holds the API's key; none sends none."""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The judge's sampling temperature."""
    max_tokens: int = Field(512, ge=1)
    """The longest judgement, in tokens."""
    concurrency: int = Field(8, ge=1)
    """Judgements under way at once."""
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Longest wait for one try's whole answer, in seconds."""
    retries: int = Field(2, ge=0)
    """More tries after one that found nobody, timed out, or was answered 408, 409, 429 or 5xx."""
    backoff_s: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Pause before the second try, in seconds; it doubles with each further one."""

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest} is not below highest={self.highest}")
        return self


class PythonOptions(RewardOptions):
    """A function of your own, in a process of its own."""

    name: Literal["python"] = "python"
    """The reward."""
    function: str = Field(pattern=_FUNCTION)
    """`module:function`; it gets one `train.rewards.Sample` and returns a number, or None where it cannot judge."""
    path: Path | None = None
    """A folder to import the module from, in front of what Python finds by itself."""
    timeout_s: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Longest call, in seconds; the process is then killed and started again."""
    start_timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Longest start of the process, the module's import included, in seconds."""
    processes: int = Field(1, ge=1)
    """Processes that share the samples."""


class PreferencesOptions(RewardOptions):
    """A Bradley-Terry head on the frozen model's own features, learnt from the store's pairs."""

    name: Literal["preferences"] = "preferences"
    """The reward."""
    head: Path | None = None
    """A head's folder, learnt before by the same model; none learns one when the job starts."""
    min_accuracy: float = Field(0.6, ge=0, le=1)
    """Least share of held-out pairs that the head must order rightly; below it the job does not start."""
    min_held_out: int = Field(20, ge=1)
    """Fewest held-out pairs by which that may be told."""
    held_out: float = Field(0.2, gt=0, lt=0.9)
    """Share of prompts (by hash) that it does not learn from, where the job's own snapshot holds none out."""
    l2: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Weight of the squared norm beside the mean loss; none tries several over five parts of the training prompts."""
    max_length: int = Field(1024, ge=32)
    """Prompt plus answer, in tokens; longer pairs are left out of the learning, longer samples are not judged."""
    batch_size: int = Field(4, ge=1)
    """Conversations in one forward."""
    state: FeatureState = "last"
    """What a head that is learnt here reads: the model's last hidden state at the answer's last token, its mean over
    the answer's tokens, or both."""
    value: Literal["sigmoid", "raw"] = "sigmoid"
    """`raw`: the score, of mean 0 and standard deviation 1 over the answers that were learnt from; `sigmoid`: the same
    between 0 and 1."""


def compiled(pattern: str) -> str:
    """The pattern itself. Raises ValueError where it is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern
