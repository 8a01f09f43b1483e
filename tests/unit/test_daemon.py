"""The daemon: when it starts a job, what it says when it does not, and how a job goes on after an interruption."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noria.errors import LeaseLost, SettingsError, TrainingError
from noria.records import STAGES, Choice, Completion, Job, Json, ProcessInfo, Side, Stage, Version
from noria.settings import Settings, TrainSettings
from noria.store import Store
from train.daemon import Trainer, job_context
from train.log import EventLog
from train.pipeline.context import JobContext
from train.pipeline.files import clean, once
from train.pipeline.lineage import require_disk
from train.pipeline.release import rollout
from train.pipeline.runner import run_job
from train.policy import Decision, Facts, check_window, decide

NOON = 1_700_049_600.0  # 2023-11-15 12:00:00 UTC, a Wednesday


def train(**policy: Any) -> TrainSettings:
    return TrainSettings.model_validate({"policy": {"min_preferences": 200, **policy}, "min_pairs": 8})


def facts(**more: Any) -> Facts:
    return Facts(**{"now": NOON, "unused": 200, "live": "v1", **more})


def test_enough_unused_preferences_start_a_job() -> None:
    assert decide(train(), facts(pairs=180)) == Decision(True, None, "min_preferences")


@pytest.mark.parametrize(
    ("policy", "now", "why"),
    [
        ({}, {"unused": 37}, "idle: 37 of 200 unused preferences"),
        ({}, {"live": None}, "idle: no model is live yet; add one with `noria model add`"),
        ({}, {"busy": "job_9"}, "idle: job job_9 is queued or runs in another trainer"),
        (
            {"automatic": False},
            {},
            "idle: automatic training is off (train.policy.automatic); 200 unused preferences",
        ),
        (
            {"min_interval_s": 3600},
            {"last_automatic_at": NOON - 600},
            "idle: 200 unused preferences, next automatic start in 50 min (train.policy.min_interval_s)",
        ),
        (
            {"window": "* 2-5 * * *"},
            {},
            "idle: waiting for the window '* 2-5 * * *' (UTC), next at 2023-11-16 02:00",
        ),
        (
            {},
            {"pairs": 3},
            "idle: 200 unused preferences make 3 training pairs, 8 are needed (train.min_pairs); "
            "the others are duplicate, contradictory, unusable or held out",
        ),
    ],
)
def test_idleness_is_told_in_plain_words(policy: Json, now: Json, why: str) -> None:
    assert decide(train(**policy), facts(**now)) == Decision(False, why)


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({"unused": 37}, "idle: 37 of 200 unused thumbs"),
        (
            {"pairs": 3},
            "idle: 200 unused thumbs make 3 training answers, 8 are needed (train.min_pairs); "
            "the others are duplicate, contradictory, unusable or held out",
        ),
        (
            {"pairs": 90, "one_sided": True},
            "idle: 200 unused thumbs are all up or all down: thumbs of both kinds are needed",
        ),
    ],
)
def test_a_method_that_learns_from_thumbs_waits_for_thumbs(now: Json, why: str) -> None:
    assert decide(train(method="kto"), facts(**now)) == Decision(False, why)
    assert decide(train(method="kto"), facts(pairs=90)).start


def test_the_interval_ends_and_the_window_opens() -> None:
    assert decide(train(min_interval_s=600), facts(last_automatic_at=NOON - 600)).start
    opened = decide(train(window="* 12 * * 3"), facts())
    assert opened == Decision(True, None, "window")
    assert not decide(train(window="1 12 * * *"), facts()).start


def test_a_window_that_is_no_cron_expression_is_refused() -> None:
    check_window("*/5 1 * * mon")
    with pytest.raises(SettingsError, match="not a cron expression"):
        check_window("at night")


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    """A home whose policy asks for two preferences, with a lease short enough to lose."""
    policy = {"min_preferences": 2, "min_interval_s": 0}
    return Settings.model_validate(
        {"home": tmp_path, "train": {"policy": policy, "min_pairs": 1, "held_out": 0.0, "lease_s": 1.5, "poll_s": 0.01}}
    )


@pytest.fixture
def store(home: Settings) -> Iterator[Store]:
    with Store.open(home.store_url) as opened:
        opened.add_version(Version("v1", None, "candidate", "base", None, 1.0))
        opened.promote("v1")
        yield opened


def judge(store: Store, number: int) -> None:
    """One completion with two answers and a preference between them."""
    choices = tuple(
        Choice(index, f"answer {index} to {number}", {"role": "assistant", "content": f"answer {index} to {number}"})
        for index in range(2)
    )
    messages = ({"role": "user", "content": f"question {number}"},)
    store.add_completions(
        [Completion(f"chatcmpl-{number}", 1.0, "noria", "v1", messages, {}, f"hash{number}", choices)]
    )
    store.add_preference(Side(f"chatcmpl-{number}", 0), Side(f"chatcmpl-{number}", 1), annotator="ann")


def trainer(
    home: Settings, store: Store, run: Callable[[Trainer, Job], str], stopping: threading.Event | None = None
) -> Trainer:
    return Trainer(home, store, stopping or threading.Event(), EventLog(io.StringIO()), run)


def stages(ran: list[str], broken: dict[str, Exception] | None = None) -> dict[Stage, Callable[[JobContext], Json]]:
    """A pipeline whose stages only note that they ran, or fail."""

    def make(stage: Stage) -> Callable[[JobContext], Json]:
        def stage_run(ctx: JobContext) -> Json:
            ran.append(stage)
            if broken and stage in broken:
                raise broken.pop(stage)
            return {"version": "v2"} if stage == "publish" else {"from": stage}

        return stage_run

    return {stage: make(stage) for stage in STAGES}


def test_the_policy_creates_a_job_and_the_daemon_runs_it(home: Settings, store: Store) -> None:
    ran: list[str] = []
    one = trainer(home, store, lambda t, job: run_job(job_context(t, job), stages(ran)))
    judge(store, 1)
    assert one.consider().idle_reason == "idle: 1 of 2 unused preferences"
    assert not one.step()
    judge(store, 2)
    assert one.step()  # creates
    assert one.step()  # claims and runs
    job = store.list_jobs(1)[0]
    assert ran == list(STAGES)
    assert (job.state, job.version, job.reason, job.progress) == ("succeeded", "v2", "min_preferences", 1.0)
    assert list(job.done) == list(STAGES)


def test_judgements_that_make_no_pairs_start_nothing(home: Settings, store: Store) -> None:
    judge(store, 1)
    store.add_preference(Side("chatcmpl-1", 1), Side("chatcmpl-1", 0), annotator="other")
    decision = trainer(home, store, lambda t, job: "succeeded").consider()
    assert decision.idle_reason is not None
    assert decision.idle_reason.startswith("idle: 2 unused preferences make 0 training pairs, 1 are needed")


def test_the_policy_of_kto_counts_thumbs_of_both_kinds(home: Settings, store: Store) -> None:
    """Preferences do not start it, nor thumbs that are all up."""
    policy = home.train.policy.model_copy(update={"method": "kto"})
    home = home.model_copy(update={"train": home.train.model_copy(update={"policy": policy})})
    ran: list[str] = []
    one = trainer(home, store, lambda t, job: run_job(job_context(t, job), stages(ran)))
    for number in range(3):
        judge(store, number)
    assert one.consider().idle_reason == "idle: 0 of 2 unused thumbs"
    for number in range(2):
        store.add_feedback(f"chatcmpl-{number}", 0, thumb="up")
    reason = one.consider().idle_reason
    assert reason == "idle: 2 unused thumbs are all up or all down: thumbs of both kinds are needed"
    store.add_feedback("chatcmpl-2", 0, thumb="down")
    assert one.step()  # creates
    assert one.step()  # claims and runs
    assert [(job.method, job.state) for job in store.list_jobs()] == [("kto", "succeeded")]


def test_the_operators_job_goes_before_the_policy(home: Settings, store: Store) -> None:
    ran: list[str] = []
    asked = store.create_job("dpo", {}, "none")
    one = trainer(home, store, lambda t, job: run_job(job_context(t, job), stages(ran)))
    assert one.step()
    assert store.get_job(asked.id).state == "succeeded"
    assert not one.step()


def test_a_shutdown_hands_the_job_back_and_the_next_trainer_goes_on(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {}, "none")
    ran: list[str] = []
    stop = LeaseLost("the trainer is stopping", code="shutdown")
    first = trainer(home, store, lambda t, j: run_job(job_context(t, j), stages(ran, {"quantize": stop})))
    first.step()
    released = store.get_job(job.id)
    assert (released.state, released.owner, list(released.done)) == ("running", None, ["snapshot", "train", "merge"])
    second = trainer(home, store, lambda t, j: run_job(job_context(t, j), stages(ran)))
    second.step()
    assert ran == ["snapshot", "train", "merge", "quantize", "quantize", "verify", "publish", "rollout"]
    ended = store.get_job(job.id)
    assert (ended.state, ended.attempt) == ("succeeded", 2)


def test_a_failed_stage_fails_the_job_and_keeps_the_small_files(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {}, "none")
    folder = home.jobs_dir / job.id
    for name in ("merged", "serving.tmp", "adapter"):
        (folder / name).mkdir(parents=True)
    wrong = TrainingError("loss nan is not finite", code="non_finite")
    trainer(home, store, lambda t, j: run_job(job_context(t, j), stages([], {"train": wrong}))).step()
    ended = store.get_job(job.id)
    assert (ended.state, ended.error) == ("failed", {"code": "non_finite", "message": "loss nan is not finite"})
    assert sorted(path.name for path in folder.iterdir()) == ["adapter"]


def test_an_unexpected_error_fails_the_job_and_leaves_its_traceback(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {}, "none")
    trainer(home, store, lambda t, j: run_job(job_context(t, j), stages([], {"merge": ValueError("odd")}))).step()
    ended = store.get_job(job.id)
    assert ended.error == {"code": "internal_error", "message": "ValueError: odd"}
    assert "ValueError: odd" in (home.jobs_dir / job.id / "error.txt").read_text()


def test_wrong_settings_of_a_job_fail_it_by_name(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {"dpo": {"beta": -1}}, "none")
    Trainer(home, store, threading.Event(), EventLog(io.StringIO())).step()
    error = store.get_job(job.id).error
    assert error is not None
    assert error["code"] == "invalid_settings"
    assert error["message"].startswith("settings.dpo.beta:")


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


def test_cancelling_reaches_long_work_through_the_heartbeat(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {}, "none")
    working, stopping = threading.Event(), threading.Event()

    def endless(ctx: JobContext) -> Json:
        working.set()
        while True:
            ctx.check()
            time.sleep(0.005)

    one = trainer(home, store, lambda t, j: run_job(job_context(t, j), {**stages([]), "train": endless}), stopping)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        assert working.wait(20)
        store.request_cancel(job.id)
        until(lambda: store.get_job(job.id).state == "cancelled")
    finally:
        stopping.set()
        thread.join(20)
    assert store.processes("trainer") == []


def test_a_trainer_whose_job_was_taken_over_lets_go(home: Settings, store: Store) -> None:
    job = store.create_job("dpo", {}, "none")
    outcomes: list[str] = []

    def stolen(t: Trainer, j: Job) -> str:
        store.release_job(j.id, t.owner)
        assert store.claim_job("another", 60) is not None
        outcomes.append(run_job(job_context(t, j), stages([])))
        return outcomes[-1]

    trainer(home, store, stolen).step()
    assert outcomes == ["lost"]
    assert (store.get_job(job.id).state, store.get_job(job.id).owner) == ("running", "another")


def test_the_pulse_tells_why_the_trainer_is_idle(home: Settings, store: Store) -> None:
    stopping = threading.Event()
    one = trainer(home, store, lambda t, j: "succeeded", stopping)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        until(
            lambda: any(p.info["idle_reason"] == "idle: 0 of 2 unused preferences" for p in store.processes("trainer"))
        )
    finally:
        stopping.set()
        thread.join(20)


def rolled(home: Settings, store: Store, server: bool, end: str | None) -> Json:
    """Runs the rollout stage for v2, with or without a server, whose outcome another thread reports."""
    store.add_version(Version("v2", "v1", "candidate", "dpo", None, 2.0))
    one = trainer(home, store, lambda t, j: "succeeded")
    store.create_job("dpo", {}, "direct")
    job = store.claim_job(one.owner, 60)
    assert job is not None
    ctx = job_context(one, job)
    ctx.done["publish"] = {"version": "v2"}
    if server:
        store.beat(ProcessInfo("server-1", "server", time.time(), {}))
    if end is not None:

        def serve() -> None:
            until(lambda: store.claim_rollout("server-1") is not None)
            made = store.list_rollouts(1)[0]
            if end == "succeeded":
                store.promote("v2", made.id)
            else:
                store.finish_rollout(made.id, "failed", "the probe said no")

        threading.Thread(target=serve).start()
    return rollout(ctx)


def test_a_rollout_is_waited_for(home: Settings, store: Store) -> None:
    told = rolled(home, store, server=True, end="succeeded")
    assert (told["state"], told["note"], store.live()) == ("succeeded", "v2 went live", "v2")


def test_a_failed_rollout_is_told_and_does_not_fail_the_job(home: Settings, store: Store) -> None:
    told = rolled(home, store, server=True, end="failed")
    assert told["state"] == "failed"
    assert told["note"] == "v2 is published, but its rollout failed: the probe said no"
    assert store.list_jobs(1)[0].metrics["rollout"]["state"] == "failed"


def test_without_a_server_the_rollout_stays_queued(home: Settings, store: Store) -> None:
    told = rolled(home, store, server=False, end=None)
    assert (told["state"], store.list_rollouts(1)[0].state) == ("queued", "queued")


def test_a_disk_that_is_too_small_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"needs about 22\.25 GiB in .*, 3\.00 GiB are free") as refused:
        require_disk(10 * 1024**3, tmp_path, free_bytes=3 * 1024**3)
    assert refused.value.code == "disk_too_small"
    require_disk(10 * 1024**3, tmp_path, free_bytes=23 * 1024**3)


def test_a_receipt_makes_work_happen_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def produce() -> Json:
        calls.append(1)
        return {"n": len(calls)}

    assert [once(tmp_path / "deep" / "r.json", produce) for _ in range(3)] == [{"n": 1}] * 3
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == {"n": 1}


def test_keep_merged_keeps_the_merged_model(tmp_path: Path) -> None:
    for name in ("merged", "merged.tmp", "serving", "adapter"):
        (tmp_path / name).mkdir()
    clean(tmp_path, keep_merged=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_waiting_trainer_has_not_loaded_torch() -> None:
    code = "import sys, train.daemon, train.pipeline.runner; sys.exit('torch' in sys.modules or 'serve' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_subcommand_is_answered_with_the_usage() -> None:
    told = subprocess.run([sys.executable, "-m", "train", "dance"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr.splitlines()[0]) == (
        2,
        "usage: python -m train            run the trainer daemon",
    )
