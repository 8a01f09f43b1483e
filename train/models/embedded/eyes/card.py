"""The model card, written from the record and from what was measured: no figure in it is typed by hand.

Comes in: an eyes folder. Goes out: `MODEL_CARD.md`. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from noria.recipes import Recipe, parse_recipe
from noria.records import Json
from noria.scenes.photos import PHOTOS
from noria.scenes.sets import WRITTEN
from train.models.embedded.eyes.record import CARD, RECORD, SCORES, WEIGHTS, EyesRecord, read_record
from train.models.embedded.eyes.scores import Scores, gathered, read_scores
from train.models.embedded.tower import PATCH_SIZE, PATCHES, PICTURE_SIZE, TOWER_HEADS, TOWER_LAYERS, TOWER_WIDTH

AGAIN = "noria model build-embedded"
NOT_YET = "Not measured yet."
UNKNOWN = "none of Noria's own sets."
SOURCES = {
    "scenes": "scenes that `noria.scenes` draws: shapes, colours, sizes, places, counts and printed digits on several "
    "grounds, textures of the photographs below among them. This project's own, Apache-2.0.",
    "digits": "handwritten digits: scikit-learn's copy of the UCI test set (E. Alpaydin and C. Kaynak, 1998, "
    "https://doi.org/10.24432/C50P49), CC BY 4.0.",
    "photos": "cuttings of scikit-image's sample photographs: public domain, CC0, or no known restrictions; one by one "
    "in `noria/scenes/data/NOTICE.md`.",
    "text": "SmolLM2-135M-Instruct's own greedy answers to questions of this project, without pictures, Apache-2.0: "
    "they keep its language.",
    **{
        f"{name}{WRITTEN}": f"the pictures of `{name}`, whose labels are laid out as a text: a row a thing, a word a "
        "patch."
        for name in ("scenes", "digits", "photos")
    },
}


def write_card(folder: Path, measured: Sequence[Path], plain: Sequence[Path], perplexity: Path | None) -> Scores | None:
    """Keeps the figures of these files beside those that are kept, and writes the card anew.

    Raises IntegrityError for a folder without a record, NotFound and InvalidRequest for files that hold no figures.
    """
    record = read_record(folder)
    scores = read_scores(folder, record)
    if measured or plain or perplexity is not None:
        scores = gathered(record, measured, plain, perplexity, scores)
        (folder / SCORES).write_text(scores.model_dump_json(indent=2) + "\n")
    (folder / CARD).write_text(render_card(record, scores))
    return scores


def render_card(record: EyesRecord, scores: Scores | None) -> str:
    """The card's text."""
    recipe = parse_recipe(record.recipe)
    parts = (_what(record), _data(recipe), _made(record), _seen(scores), _said(scores), _limits(), _licence(record))
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def _what(record: EyesRecord) -> Iterator[str]:
    side = f"{PICTURE_SIZE} by {PICTURE_SIZE}"
    yield from ("# The embedded model's eyes", "")
    yield (
        f"What Noria lays over {record.language_model} so that its embedded model sees: a CLIP tower ({TOWER_LAYERS} "
        f"layers of width {TOWER_WIDTH}, {TOWER_HEADS} heads; pictures of {side} pixels in patches of {PATCH_SIZE}), "
        f"an aligner of two linears ({PATCHES} patches become as many words)" + _lora_words(record) + "."
    )
    yield ""
    yield (
        f"`{WEIGHTS}`: {record.tensors} tensors, {record.parameters:,} numbers in bfloat16, "
        f"{record.size / 1e6:.2f} MB, sha256 `{record.sha256}`. `{RECORD}` says how they were "
        "made. It is an example, small enough for any machine "
        "and trained by the stages that train every other model here; it is not a model to rely on."
    )


def _lora_words(record: EyesRecord) -> str:
    lora = record.lora
    if lora is None:
        return "; the language model is as it was"
    return f", and a LoRA of the language model (rank {lora.rank}, alpha {lora.alpha:g}, {lora.linears} linears)"


def _data(recipe: Recipe) -> Iterator[str]:
    yield from ("## Data and their licences", "")
    drawn = [(stage.name, one) for stage in recipe.stages for one in stage.data]
    for source in dict.fromkeys(one.source for _, one in drawn):
        counts = [f"{one.count or 0:,} in `{stage}`" for stage, one in drawn if one.source == source]
        yield f"- `{source}`: {SOURCES.get(source, UNKNOWN)} {', '.join(counts)}."
    yield ""
    yield (
        "Nothing else was seen. Evaluation asks of other seeds, of combinations of colour, shape, size and ground that "
        "no training picture shows, and of digits that other hands wrote."
    )


def _made(record: EyesRecord) -> Iterator[str]:
    seconds = sum(stage.seconds for stage in record.stages)
    yield from ("## How they were made", "")
    yield (
        f"By the recipe `embedded.toml` ({record.recipe_sha256}) on {record.machine}: {seconds:,.0f} seconds of "
        f"training ({seconds / 3600:.2f} hours). `{AGAIN}` makes them again."
    )
    yield ""
    rows = [
        (
            stage.name,
            f"{stage.trainable_parameters:,}",
            f"{stage.samples:,}",
            f"{stage.steps:,}",
            f"{stage.seconds:,.0f}",
            f"{stage.loss_first:.3f} to {stage.loss_last:.3f}",
        )
        for stage in record.stages
    ]
    yield from _table(("stage", "parameters trained", "samples", "steps", "seconds", "loss"), rows)
    yield ""
    yield "With " + ", ".join(f"{name} {number}" for name, number in record.versions.items()) + "."


def _seen(scores: Scores | None) -> Iterator[str]:
    yield from ("## What they see", "")
    found = {} if scores is None else {name: one for name, one in scores.measured.items() if name != "embedded-text"}
    if scores is None or not found:
        yield NOT_YET
        return
    yield (
        "Share of held-out questions answered rightly through the live server, on the GPTQ weights, with 95 % Wilson "
        "intervals; `noria eval v1 --set embedded --json` gives them again."
    )
    for name, one in found.items():
        yield from ("", *_rates(name, one, scores.plain.get(name)))


def _said(scores: Scores | None) -> Iterator[str]:
    yield from ("## What it still says", "")
    text = None if scores is None else scores.measured.get("embedded-text")
    if scores is None or (text is None and scores.perplexity is None):
        yield NOT_YET
        return
    if text is not None:
        yield "Plain questions without pictures, beside plain SmolLM2 through the same server and quantisation:"
        yield from ("", *_rates("embedded-text", text, scores.plain.get("embedded-text")))
    if (read := scores.perplexity) is not None:
        yield from ([""] if text is not None else [])
        change = 100 * (read.eyes / read.plain - 1)
        yield (
            f"Perplexity of {read.text} ({read.tokens:,} tokens): {read.eyes:.2f}, plain SmolLM2 {read.plain:.2f} "
            f"({change:+.1f} %)."
        )


def _rates(name: str, measured: Json, plain: Json | None) -> Iterator[str]:
    rows = []
    for kind, rate in _kinds(measured):
        row = [kind, *_rate(rate), str(rate["n"])]
        rows.append([*row, *_rate(dict(_kinds(plain)).get(kind))] if plain else row)
    beside = ("plain SmolLM2", "95 %") if plain else ()
    yield from _table((f"`{name}`", "right", "95 %", "questions", *beside), rows)


def _kinds(evaluation: Json) -> Iterator[tuple[str, Json]]:
    yield from evaluation["scores"].get("categories", {}).items()
    yield "all", evaluation["scores"]


def _rate(rate: Json | None) -> tuple[str, str]:
    if rate is None:
        return "", ""
    return f"{100 * rate['score']:.1f} %", f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}"


def _limits() -> Iterator[str]:
    yield from ("## Limits", "")
    yield (
        f"- It knows drawn scenes, single digits and {len(PHOTOS)} photographs. Of other pictures it says what it "
        "would say of those."
    )
    yield f"- Every picture is shrunk to {PICTURE_SIZE} by {PICTURE_SIZE} pixels, whatever its shape."
    yield "- The language model is a very small one: it is wrong about much, and English is all it speaks well."
    yield "- It was not examined for bias or safety. Nobody should decide anything by it."


def _licence(record: EyesRecord) -> Iterator[str]:
    yield from ("## Licence", "")
    yield (
        "Apache-2.0, as the rest of Noria. The language model, SmolLM2-135M-Instruct by Hugging Face, is Apache-2.0 "
        f"too. It is fetched, and no part of this folder: `{record.language_model}`, sha256 "
        f"`{record.language_model_sha256}`."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(row)} |"
