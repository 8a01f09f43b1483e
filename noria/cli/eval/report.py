"""Evaluations on the terminal: one result by category, two side by side, the list of all, the answers of one.

Comes in: evaluations. Goes out: lines on standard output, warnings on standard error, or plain JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from noria.cli.context import print_fields, print_table, say, when
from noria.evals.questions import QuestionSet
from noria.evals.scores import paired
from noria.records import Evaluation, EvaluationAnswer, Json

SHOWN_BAD = 10
CELL = 60


def tell_bad_rows(asked: QuestionSet) -> None:
    """What was left out of a set, and why: the first rows, and how many there are."""
    for row in asked.bad[:SHOWN_BAD]:
        say(str(row))
    if asked.bad:
        say(f"{asked.name}: {len(asked.bad)} bad rows left out, {len(asked.questions)} questions asked")


def show(evaluation: Evaluation) -> None:
    """One result: the whole set, then each category."""
    scores, run, counts = evaluation.scores, evaluation.run, evaluation.counts
    took = f"{run.get('seconds', 0.0):.0f} s, server: {run.get('through')}"
    typer.echo(f"{evaluation.version} on {evaluation.set_name}: {scores['n']} questions, {took} ({evaluation.id})")
    grouped = "all_right" in scores
    columns = ("", "score", "95 %", "n", *(("all right", "95 %", "groups") if grouped else ()))
    print_table(columns, [(name, *_rate(one), *_grouped(one, grouped)) for name, one in _parts(scores)])
    if "mme" in scores:
        points = scores["mme"]
        typer.echo(f"MME points: perception {points['perception']:.2f}, cognition {points['cognition']:.2f}")
    for count, what in (("failed", "refused by the server and counted as wrong"), ("cut", "cut by --max-tokens")):
        if counts.get(count):
            say(f"{evaluation.set_name}: {counts[count]} of {scores['n']} answers were {what}")


def compare(first: Evaluation, second: Evaluation, answers: tuple[Sequence[EvaluationAnswer], ...]) -> Json:
    """Two results as one JSON: each category of both, the difference, and question by question where they match."""
    warning = warning_of(first, second)
    parts = dict(_parts(second.scores))
    rows = [
        {"part": name, "first": one, "second": parts[name], "difference": one["score"] - parts[name]["score"]}
        for name, one in _parts(first.scores)
        if name in parts
    ]
    same = first.set_hash == second.set_hash
    by_question = vars(paired(*([one.score for one in side] for side in answers))) if same else None
    return {
        "set": first.set_name,
        "versions": [first.version, second.version],
        "evaluations": [first.id, second.id],
        "rates": rows,
        "by_question": by_question,
        "warning": warning,
    }


def show_comparison(compared: Json) -> None:
    """The JSON of `compare` as a table."""
    one, other = compared["versions"]
    if compared["warning"]:
        say(f"warning: {compared['warning']}")
    typer.echo(f"{compared['set']}: {one} against {other}")
    rows = [
        (row["part"], *_rate(row["first"])[:2], *_rate(row["second"])[:2], f"{100 * row['difference']:+.1f}")
        for row in compared["rates"]
    ]
    print_table(("", one, "95 %", other, "95 %", "difference"), rows)
    found = compared["by_question"]
    if found:
        better, worse = f"{one} better on {found['better']}", f"worse on {found['worse']}"
        typer.echo(f"{better}, {worse}, the same on {found['same']} questions; sign test p = {found['p']:.3g}")


def warning_of(first: Evaluation, second: Evaluation) -> str | None:
    """Why two results of one set do not compare; None when they do."""
    pair = f"{first.version} ({first.id}) and {second.version} ({second.id})"
    if first.set_hash != second.set_hash:
        short = " and ".join(one.set_hash.removeprefix("sha256:")[:12] for one in (first, second))
        return f"{pair} were asked different questions under the name {first.set_name} (hashes {short})"
    if first.sampling != second.sampling:
        return f"{pair} were sampled differently: {first.sampling} and {second.sampling}"
    return None


def show_list(evaluations: Sequence[Evaluation]) -> None:
    """Every result, the newest first, and a warning where a set's name stands for different questions."""
    print_table(
        ("id", "version", "set", "set hash", "score", "95 %", "n", "server", "when"),
        [(*_named(one), *_rate(one.scores), one.run.get("through"), when(one.created_at)) for one in evaluations],
    )
    hashes: dict[str, set[str]] = {}
    for one in evaluations:
        hashes.setdefault(one.set_name, set()).add(short_hash(one))
    for name, found in sorted(hashes.items()):
        if len(found) > 1:
            listed = ", ".join(sorted(found))
            say(f"warning: {name} stands for different questions here ({listed}): these do not compare")


def short_hash(evaluation: Evaluation) -> str:
    """The first twelve digits of the set's hash."""
    return evaluation.set_hash.removeprefix("sha256:")[:12]


def _named(one: Evaluation) -> tuple[str, ...]:
    return one.id, one.version, one.set_name, short_hash(one)


def show_answers(evaluation: Evaluation, answers: Sequence[EvaluationAnswer]) -> None:
    """One result with the questions as they were answered."""
    keys = ("id", "version", "set_name", "set_hash", "sampling", "counts", "run")
    print_fields({**{key: getattr(evaluation, key) for key in keys}, "created": when(evaluation.created_at)})
    print_table(("question", "score", "expected", "answer", "asked"), [_answered(one) for one in answers])


def _answered(one: EvaluationAnswer) -> tuple[str, ...]:
    said = _cell(one.error or one.answer)
    return one.question_id, f"{one.score:g}", _cell(" | ".join(one.expected)), said, _cell(one.question)


def _parts(scores: Json) -> list[tuple[str, Json]]:
    return [("all", scores), *sorted((scores.get("categories") or {}).items())]


def _rate(rate: Json) -> tuple[str, str, int]:
    return f"{100 * rate['score']:.1f} %", f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]", rate["n"]


def _grouped(rate: Json, wanted: bool) -> tuple[object, ...]:
    if not wanted:
        return ()
    return _rate(rate["all_right"]) if "all_right" in rate else (None, None, None)


def _cell(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CELL else text[: CELL - 3] + "..."
