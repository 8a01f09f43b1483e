"""`noria eval`: asks a version questions with known answers, through vLLM, and keeps and compares the scores.

Comes in: a version, sets. Goes out: scores on the terminal and in the store. Must not import httpx, rich or the store
at import: `--help` must stay quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from noria.cli.context import AsJson, Place, place, print_json, say
from noria.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from noria.evals.ask import Target
    from noria.evals.questions import QuestionSet
    from noria.records import Evaluation, EvaluationAnswer, Json
    from noria.store import Store

    Result = tuple[Evaluation, list[EvaluationAnswer]]

app = typer.Typer()

SET = "embedded, embedded-text, or a file or folder: .jsonl, TextVQA's, MME's, MMMU's. May be said again."
COMPARE = "Another version, shown beside: what is kept of it on the same questions, else it is asked too."
KEPT = "Ask nothing: take the newest results that are kept."
METRIC = "Of .jsonl rows that name none: exact, contains, number, anls, vqa, yes_no."


@app.command("eval", epilog="Example: noria eval v2 --set embedded --set questions.jsonl --compare v1")
def evaluate(
    ctx: typer.Context,
    version: Annotated[str | None, typer.Argument(help="v2, or live.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="NAME|FILE", help=SET)] = None,
    compare: Annotated[str | None, typer.Option(metavar="VERSION", help=COMPARE)] = None,
    kept: Annotated[bool, typer.Option("--kept", help=KEPT)] = False,
    metric: Annotated[str, typer.Option(help=METRIC)] = "exact",
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions of each set, categories in turn.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions under way at once.")] = 8,
    listed: Annotated[bool, typer.Option("--list", help="List what is kept, of VERSION where it is named.")] = False,
    shown: Annotated[str | None, typer.Option("--show", metavar="ID", help="One result with every answer.")] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="With --show: only answers that were not right.")] = False,
    as_json: AsJson = False,
) -> None:
    """Scores a version on questions with known answers, asked through vLLM, and keeps the result."""
    with place(ctx).store() as store:
        if shown is not None:
            _show(store, shown, wrong, as_json)
        elif listed:
            _list(store, version, sets, as_json)
        else:
            versions = [_known(store, one) for one in (version, compare) if one is not None]
            if version is None:
                raise InvalidRequest("which version? `noria eval v2`, or `noria eval --list`", param="version")
            if kept:
                results = [_newest(store, one, sets) for one in versions]
                _tell(results, {}, as_json)
                return
            loaded = _sets(sets or ["embedded"], metric, limit)
            asking = Asking(place(ctx), store, loaded, max_tokens, concurrency)
            results = [asking.results(one, again=at == 0) for at, one in enumerate(versions)]
            _tell(results, {one.name: one for one in loaded}, as_json)


class Asking:
    """Takes versions through the same sets in the same way."""

    def __init__(self, here: Place, store: Store, sets: list[QuestionSet], max_tokens: int, concurrency: int) -> None:
        from noria.evals.measure import sampling_of

        self._here, self._store, self._sets = here, store, sets
        self._sampling, self._concurrency = sampling_of(max_tokens), concurrency

    def results(self, version: str, *, again: bool) -> list[Result]:
        """One result a set; unless `again`, what is kept of the same questions is taken."""
        from noria.cli.eval.servers import server_of

        found: dict[str, Result] = {} if again else self._kept(version)
        missing = [one for one in self._sets if one.name not in found]
        if missing:
            with server_of(self._here, self._here.settings(), version) as target:
                for asked in missing:
                    found[asked.name] = self._measured(asked, target)
        return [found[one.name] for one in self._sets]

    def _kept(self, version: str) -> dict[str, Result]:
        found: dict[str, Result] = {}
        for one in self._sets:
            for old in self._store.list_evaluations(version=version, set_name=one.name):
                if old.set_hash == one.hash and old.sampling == self._sampling:
                    found[one.name] = (old, self._store.evaluation_answers(old.id))
                    break
        return found

    def _measured(self, asked: QuestionSet, target: Target) -> Result:
        from noria.evals.measure import measure

        with _progress() as progress:
            task = progress.add_task(f"{target.version} on {asked.name}", total=len(asked.questions))
            result = measure(
                asked, target, self._sampling, concurrency=self._concurrency, tick=lambda: progress.advance(task)
            )
        self._store.add_evaluation(*result)
        return result


def _progress() -> Any:
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    return progress.Progress(*columns, *times, console=Console(stderr=True))


def _known(store: Store, version: str) -> str:
    """The version's id; `live` is the one that is. Raises NotFound."""
    if version == "live":
        live = store.live()
        if live is None:
            raise NotFound("nothing is live in this home; `noria versions` lists what there is", param="version")
        return live
    return store.get_version(version).id


def _sets(named: list[str], metric: str, limit: int | None) -> list[QuestionSet]:
    from noria.cli.eval.report import tell_bad_rows
    from noria.evals.questions import METRICS
    from noria.evals.sets import load_set

    known = next((one for one in METRICS if one == metric and one != "choice"), None)
    if known is None:
        raise InvalidRequest(f"--metric {metric}: the metrics are {', '.join(METRICS)}; choice follows from options")
    loaded = [load_set(one, metric=known, limit=limit) for one in dict.fromkeys(named)]
    twice = {one.name for one in loaded if sum(other.name == one.name for other in loaded) > 1}
    if twice:
        raise InvalidRequest(f"two sets are called {min(twice)}: results are kept by that name; rename a file")
    for one in loaded:
        tell_bad_rows(one)
    return loaded


def _newest(store: Store, version: str, sets: list[str] | None) -> list[Result]:
    """The newest result of each named set, or of every set that the version was asked. Raises NotFound."""
    from noria.evals.sets import name_of

    names = {name_of(one) for one in sets} if sets else None
    newest: dict[str, Evaluation] = {}
    for one in store.list_evaluations(version=version):
        if names is None or one.set_name in names:
            newest.setdefault(one.set_name, one)
    missing = sorted((names or set()) - set(newest))
    if missing or not newest:
        what = f"of {version} on {missing[0]}" if missing else f"of {version}"
        raise NotFound(f"no result {what} is kept; without --kept it is measured", param="set")
    return [(newest[name], store.evaluation_answers(newest[name].id)) for name in sorted(newest)]


def _tell(results: list[list[Result]], sets: dict[str, QuestionSet], as_json: bool) -> None:
    from noria.cli.eval import report

    first = results[0]
    others = {one.set_name: (one, answers) for one, answers in (results[1] if len(results) > 1 else [])}
    pairs = [(mine, others[mine[0].set_name]) for mine in first if mine[0].set_name in others]
    compared = [report.compare(one, other, (answers, theirs)) for (one, answers), (other, theirs) in pairs]
    if as_json:
        print_json({"object": "list", "data": [_wire(one, sets) for one, _ in first], "compared": compared})
        return
    if not compared:
        for one, _ in first:
            report.show(one)
    for pair in compared:
        report.show_comparison(pair)


def _wire(evaluation: Evaluation, sets: dict[str, QuestionSet]) -> Json:
    asked = sets.get(evaluation.set_name)
    return {**evaluation.to_wire(), "bad_rows": [vars(row) for row in asked.bad] if asked else None}


def _list(store: Store, version: str | None, sets: list[str] | None, as_json: bool) -> None:
    from noria.cli.eval.report import show_list
    from noria.evals.sets import name_of

    names = {name_of(one) for one in sets or []}
    of = None if version is None else _known(store, version)
    found = [one for one in store.list_evaluations(version=of) if not names or one.set_name in names]
    if as_json:
        print_json([one.to_wire() for one in found])
    elif found:
        show_list(found)
    else:
        say("nothing has been evaluated yet; `noria eval live` does it")


def _show(store: Store, id_: str, wrong: bool, as_json: bool) -> None:
    from noria.cli.eval.report import show_answers

    evaluation = store.get_evaluation(id_)
    answers = [one for one in store.evaluation_answers(id_) if not wrong or one.score < 1.0]
    if as_json:
        print_json({**evaluation.to_wire(), "answers": [one.to_wire() for one in answers]})
    else:
        show_answers(evaluation, answers)
