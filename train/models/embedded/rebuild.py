"""`noria model build-embedded`: the embedded model's eyes once more, from chance to file.

Comes in: settings, a recipe. Goes out: a version that sees, and an eyes folder. Each part is done once and found
again: the blank model, the job (which goes on from its last checkpoint), the version. Must not import `serve`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from noria.errors import Conflict, IntegrityError, InvalidRequest, NoriaError, SettingsError
from noria.recipes import Recipe, load_recipe, parse_recipe
from noria.records import Job
from noria.registry import Manifest, Registry
from noria.settings import Settings
from noria.store import Store
from train.models.add import Progress, make_live
from train.models.embedded import BLANK
from train.models.embedded.build import build_blank
from train.models.embedded.eyes.export import export_eyes
from train.models.embedded.eyes.record import SHIPPED, Eyes, read_record, recipe_hash
from train.run import run_here, told_end

Bars = Callable[[], AbstractContextManager[Progress]]
_MOST_JOBS = 1000  # that are looked through for one that has done the work


@dataclass(frozen=True)
class Rebuilt:
    """How it went: 0 with the eyes, or another exit status, whose reason has been said."""

    status: int
    eyes: Eyes | None = None


def recipe_to_run(file: Path | None, shipped: Path = SHIPPED) -> Recipe:
    """The recipe in `file`, or the one by which the shipped eyes were made; it starts from the blank model.

    Raises InvalidRequest for a recipe that names another model, and as `load_recipe` and `read_record`.
    """
    recipe = _shipped_recipe(shipped) if file is None else load_recipe(file)
    if recipe.model not in (None, BLANK):
        raise InvalidRequest(
            f"recipe {recipe.name!r} starts from model {recipe.model!r}, and build-embedded trains {BLANK!r}: "
            "run it with `noria train run`",
            param="recipe",
        )
    return recipe.model_copy(update={"model": BLANK})


def _shipped_recipe(shipped: Path) -> Recipe:
    """Of the record alone: weights that are damaged are a reason to make new ones."""
    try:
        return Eyes(shipped, read_record(shipped)).recipe
    except IntegrityError as error:
        raise IntegrityError(f"{error.message}, or name a recipe with --recipe", param="recipe") from error


def rebuild(settings: Settings, recipe: Recipe, out: Path, bars: Bars) -> Rebuilt:
    """Blank model, recipe, export; what is done already is not done again. `bars` show the first part's progress.

    The version goes live where nothing is. Raises Conflict when another job is open in this home, and what the parts
    raise.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with Store.open(settings.store_url) as store, bars() as progress:
        registry = Registry(settings.models_dir, store)
        blank = build_blank(registry, settings, progress)
        version = _made(store, registry, recipe, blank)
        left = version is None and _is_left(store, recipe)
    if version is None:
        os.nice(settings.train.nice)
        wanted = {"recipe": recipe.model_dump(mode="json", exclude_defaults=True)}
        job, outcome = run_here(settings, None if left else wanted)
        status = told_end(job, outcome)
        if status or job.version is None:
            return Rebuilt(status)
        version = job.version
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        eyes = export_eyes(version, registry, settings, out)
        make_live(registry, registry.manifest(version))
    return Rebuilt(0, eyes)


def _made(store: Store, registry: Registry, recipe: Recipe, blank: Manifest) -> str | None:
    """The newest version that this recipe made of the blank model."""
    for job in store.list_jobs(_MOST_JOBS, state="succeeded"):
        if job.version is None or not _is_by(job, recipe):
            continue
        try:
            manifest = registry.manifest(job.version)
        except NoriaError:
            continue  # a folder that cannot be read is no version to take anything from
        if manifest.parent == blank.id:
            return manifest.id
    return None


def _is_left(store: Store, recipe: Recipe) -> bool:
    """Whether this recipe's job was cut off. Raises Conflict where it, or another one, is not to be had."""
    waiting = [*store.list_jobs(state="running"), *reversed(store.list_jobs(_MOST_JOBS, state="queued"))]
    if not waiting:
        return False
    first = waiting[0]
    if not _is_by(first, recipe):
        raise Conflict(
            f"job {first.id} ({first.method}) is {first.state} in this home, and one job runs at a time: "
            f"wait for it, or end it (`noria jobs cancel {first.id}`)",
            code="job_runs",
        )
    return True


def _is_by(job: Job, recipe: Recipe) -> bool:
    """Whether a job trains by this recipe, on the blank model."""
    if job.method != "recipe":
        return False
    try:
        asked = parse_recipe(job.settings.get("recipe", {}))
    except SettingsError:
        return False  # of another Noria
    return asked.model == BLANK and recipe_hash(asked) == recipe_hash(recipe)
