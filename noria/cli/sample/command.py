"""`noria sample`: samples groups of answers from a version, with rewards, for an operator to look at.

Comes in: a version and prompts. Goes out: the samples, with what they are worth where rewards are named. Nothing of it
is kept. Must not import httpx, rich or the store at import: `--help` must stay quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noria.cli.context import Place, json_text, place, say, shown
from noria.errors import Conflict, InvalidRequest, NotFound

if TYPE_CHECKING:
    from noria.cli.sample.prompts import Prompt
    from noria.evals.ask import Target
    from noria.records import Json
    from noria.sampling import Drawing, Group

app = typer.Typer()

PROMPTS = "A .jsonl file of prompts, or what `noria eval --set` takes: embedded, embedded-text, a file or folder."
REWARD = "A reward by its name (exact, length, ...) or its options as JSON. May be said again."
ROWS = "Print one JSON object a sample, a line each, with token ids and log-probabilities."
TOP_K = "Draw from so many tokens; 0 is all."
SHOWN = 100  # characters of a prompt in the listing


@app.command("sample", epilog="Example: noria sample v2 --prompts questions.jsonl -n 8 --reward exact")
def sample(
    ctx: typer.Context,
    version: Annotated[str, typer.Argument(help="v2, or live.")] = "live",
    prompts: Annotated[str | None, typer.Option(metavar="NAME|FILE", help=PROMPTS)] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt, instead of --prompts.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture for --prompt. May be said again.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=256, help="Samples of each prompt.")] = 4,
    reward: Annotated[list[str] | None, typer.Option(metavar="NAME|JSON", help=REWARD)] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help=TOP_K)] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest sample, in tokens.")] = 128,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first sample of each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=ROWS)] = False,
) -> None:
    """Samples groups of answers from a version, with rewards, to look at; nothing is kept."""
    from noria.cli.eval.servers import server_of
    from noria.cli.sample.prompts import prompts_of
    from noria.cli.sample.rewards import score
    from noria.sampling import Drawing

    here = place(ctx)
    asked = prompts_of(prompt, image or [], prompts, limit)
    drawing = Drawing(n, temperature, top_p, top_k, max_tokens, seed)
    wanted = _known(here, version)
    with server_of(here, here.settings(), wanted) as target:
        groups = _sampled(target, asked, drawing)
    rows = [row for group in groups for row in _rows(group, asked[group.prompt])]
    if reward and rows:
        rows = [{**row, **one} for row, one in zip(rows, score(here, rows, reward, wanted), strict=True)]
    if as_json:
        for row in rows:
            typer.echo(json_text(row))
    else:
        _show(groups, asked, rows)
    _tell_refused(groups)


def _known(here: Place, version: str) -> str:
    """The version's id; `live` is the one that is. Raises NotFound."""
    with here.store() as store:
        if version != "live":
            return store.get_version(version).id
        live = store.live()
    if live is None:
        raise NotFound("nothing is live in this home; `noria versions` lists what there is", param="version")
    return live


def _sampled(target: Target, asked: Sequence[Prompt], drawing: Drawing) -> list[Group]:
    """A group a prompt, in their order. Raises Conflict when another version comes to answer."""
    from noria.errors import Superseded
    from noria.sampling import SamplingPool

    try:
        with SamplingPool([target.url], api_key=target.api_key, give_up_s=30.0, trust=target.trust) as pool:
            found = list(pool.sample([one.messages for one in asked], drawing, version=target.version))
    except Superseded as error:
        raise Conflict(f"{target.version} no longer serves: {error.message}", code=error.code) from error
    return sorted(found, key=lambda group: group.prompt)


def _rows(group: Group, prompt: Prompt) -> Iterator[Json]:
    for one in group.samples:
        yield {
            **prompt.known,
            "id": group.id,
            "index": one.index,
            "prompt_index": group.prompt,
            "version": group.version,
            "fingerprint": group.fingerprint,
            "messages": list(group.messages),
            "text": one.text,
            "finish_reason": one.finish_reason,
            "token_ids": list(one.token_ids),
            "logprobs": list(one.logprobs),
            "logprobs_temperature": group.logprobs_temperature,
        }


def _show(groups: Sequence[Group], asked: Sequence[Prompt], rows: Sequence[Json]) -> None:
    by_group: dict[str, list[Json]] = {}
    for row in rows:
        by_group.setdefault(row["id"], []).append(row)
    for group in groups:
        answers = asked[group.prompt].known.get("answers")
        known = f"  (right: {', '.join(map(str, answers))})" if isinstance(answers, list) and answers else ""
        typer.echo(shown(f"{_words(group.messages)[:SHOWN]}{known}"))
        for row in by_group.get(group.id, []):
            typer.echo(shown(_line(row)))
    totals = [row["total"] for row in rows if row.get("total") is not None]
    if totals:
        typer.echo(f"mean reward {sum(totals) / len(totals):.4g} over {len(totals)} of {len(rows)} samples")


def _line(row: Json) -> str:
    logprobs = row["logprobs"]
    mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
    worth = ""
    if "total" in row:
        total = "-" if row["total"] is None else f"{row['total']:.3g}"
        worth = f" {total:>6}"
    cut = " ..." if row["finish_reason"] == "length" else ""
    text = " ".join(row["text"].split())
    return f"  {row['index']:>2}{worth} {len(row['token_ids']):>4} tokens {mean:>7.3f} nats  {text}{cut}"


def _words(messages: Sequence[Json]) -> str:
    """The last message's text on one line, pictures named."""
    content = messages[-1].get("content")
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "[picture]")) for part in content)
    return " ".join(str(content or "").split())


def _tell_refused(groups: Sequence[Group]) -> None:
    refused = [group for group in groups if group.error is not None]
    for group in refused[:10]:
        say(f"prompt {group.prompt}: {group.error}")
    if groups and len(refused) == len(groups):
        raise InvalidRequest(f"every prompt was refused: {refused[0].error}", param="prompts")
