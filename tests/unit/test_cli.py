"""The commands that ask the server: what they print, what they ask for, how they exit."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from noria import __version__
from noria.cli.jobs import nested
from noria.cli.main import call
from noria.errors import Conflict, InvalidRequest, NotFound
from noria.records import Json
from noria.store import Store
from tests.checks.documented import commands
from tests.unit.fake_server import Answer, event, job, page, rollout, serving, status

Run = Callable[..., tuple[int, str, str]]
EVENTS = "GET /noria/v1/jobs/job_1/events"
JOB = "GET /noria/v1/jobs/job_1"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line against a server with these answers; gives exit status, output, errors."""
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))
    monkeypatch.delenv("NORIA_URL", raising=False)

    def run(*arguments: str, answers: dict[str, Answer] | None = None) -> tuple[int, str, str]:
        with serving(answers or {}) as server:
            code = call(["--url", server.url, *arguments])
            asked.extend(server.asked)
        out, err = capsys.readouterr()
        return code, out, err

    asked: list[object] = []
    run.asked = asked  # type: ignore[attr-defined]
    return run


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ["torch", "vllm", "fastapi", "transformers", "sqlalchemy", "httpx", "pydantic", "rich.progress", "openai"]
    code = f"import sys, noria.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_answers_help_with_its_example(run: Run, name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert f"Example: noria {name.split()[0]}" in " ".join(out.split())


def test_the_version_is_printed_without_a_command(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


def test_status_for_people_and_for_programs(run: Run) -> None:
    told = status(live="v2", serving="v2", previous="v1")
    code, out, _ = run("status", answers={"GET /noria/v1/status": told})
    assert code == 0
    assert dict(line.split(None, 1) for line in out.splitlines()) == {
        "live": "v2",
        "serving": "v2",
        "previous": "v1",
        "preferences": "40 unused of 50; 200 unused start a job",
        "trainer": "idle: 40 of 200 preferences",
        "job": "-",
    }
    code, out, _ = run("status", "--json", answers={"GET /noria/v1/status": told})
    assert (code, json.loads(out)) == (0, told)


@pytest.mark.parametrize(
    ("method", "preferences", "thumbs"),
    [
        ("dpo", "40 unused of 50; 200 unused start a job", "7 unused of 9"),
        ("kto", "40 unused of 50", "7 unused of 9; 200 unused start a job"),
        ("grpo", "40 unused of 50; 200 unused start a job", "7 unused of 9"),
    ],
)
def test_status_and_why_say_which_judgements_start_a_job(run: Run, method: str, preferences: str, thumbs: str) -> None:
    told = status(thumbs={"total": 9, "unused": 7, "needed": 200}, method=method)
    answers: dict[str, Answer] = {
        "GET /noria/v1/status": told,
        "GET /noria/v1/jobs": page(),
        "GET /noria/v1/rollouts": page(),
    }
    for command in ("status", "why"):
        _, out, _ = run(command, answers=answers)
        lines = dict(line.split(None, 1) for line in out.splitlines())
        assert (lines["preferences"], lines["thumbs"]) == (preferences, thumbs)
    parts = json.loads(run("why", "--json", answers=answers)[1])
    assert parts["thumbs"] == {"text": thumbs, "total": 9, "unused": 7, "needed": 200}


def test_no_server_is_one_line_and_exit_7(capsys: pytest.CaptureFixture[str], free_port: int) -> None:
    assert call(["--url", f"http://127.0.0.1:{free_port}", "status"]) == 7
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("noria: the server at")


def test_jobs_of_a_home_without_a_server_are_its_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        left = store.start_job("recipe", {}, "none", "a trainer that died", -1.0)
    home = ["--home", str(tmp_path)]
    assert call([*home, "jobs", "--json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [left.id]
    assert call([*home, "jobs", "show", left.id]) == 0
    assert "running" in capsys.readouterr().out
    assert call([*home, "jobs", "cancel", left.id]) == 0
    assert capsys.readouterr().out == f"{left.id} cancelled\n"
    assert call([*home, "jobs", "show", "job_none"]) == 4
    assert capsys.readouterr().err == "noria: no job 'job_none'\n"


def test_a_server_that_is_not_there_is_looked_for_at_its_port(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NORIA_SERVER__HTTP_PORT", str(free_port))
    assert call(["--home", str(tmp_path), "status"]) == 7
    assert f"http://127.0.0.1:{free_port}" in capsys.readouterr().err


def test_the_home_says_where_its_server_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"GET /noria/v1/status": status()}) as server, subprocess.Popen(["sleep", "60"]) as alive:
        told = {"url": server.url, "grpc": "127.0.0.1:1", "pid": alive.pid, "version": "v1"}
        (tmp_path / "server.json").write_text(json.dumps(told))
        assert call(["--home", str(tmp_path), "status"]) == 0
        alive.kill()
        alive.wait()
        count = len(server.asked)
        call(["--home", str(tmp_path), "status"])  # a dead server's word is not taken
        assert len(server.asked) == count == 1
    capsys.readouterr()


def test_why_names_reason_snapshot_and_rollout(run: Run) -> None:
    counts = {"total": 67, "used": 57, "held_out": 6, "tie": 3, "both_bad": 0, "duplicate": 1}
    failed = rollout("failed", reason="the probe differs by 0.9 nats", finished_at=0.0)
    answers: dict[str, Answer] = {
        "GET /noria/v1/status": status(),
        "GET /noria/v1/jobs": page(job(version="v2")),
        "GET /noria/v1/versions/v2": {"id": "v2", "metrics": {"counts": counts}},
        "GET /noria/v1/rollouts": page(failed),
    }
    code, out, _ = run("why", answers=answers)
    assert code == 0
    assert "has not started: 40 of 200 preferences" in out
    assert "57 used, 6 held_out; left out: 3 tie, 1 duplicate" in out
    assert "v2 failed: the probe differs by 0.9 nats" in out
    _, out, _ = run("why", "--json", answers=answers)
    assert json.loads(out)["its snapshot"]["counts"]["tie"] == 3


@pytest.mark.parametrize(
    ("method", "counts", "text"),
    [
        ("grpo", {"0:captured": 40, "1:a:b.jsonl": 9}, "prompts: 40 of captured, 9 of a:b.jsonl"),
        ("recipe", {"prefer": 12, "play": 8}, "rows: 12 of prefer, 8 of play"),
    ],
)
def test_why_counts_prompts_and_rows_by_where_they_come_from(run: Run, method: str, counts: Json, text: str) -> None:
    """None of them is left out."""
    answers: dict[str, Answer] = {
        "GET /noria/v1/status": status(),
        "GET /noria/v1/jobs": page(job(method=method, version="v2")),
        "GET /noria/v1/versions/v2": {"id": "v2", "metrics": {"counts": counts}},
        "GET /noria/v1/rollouts": page(),
    }
    _, out, _ = run("why", answers=answers)
    assert text in out
    assert "left out" not in out


@pytest.mark.parametrize(("state", "text"), [("running", "not taken yet"), ("failed", "none was taken")])
def test_why_says_whether_a_snapshot_is_still_to_come(run: Run, state: str, text: str) -> None:
    answers: dict[str, Answer] = {
        "GET /noria/v1/status": status(),
        "GET /noria/v1/jobs": page(job(state, metrics={})),
        "GET /noria/v1/rollouts": page(),
    }
    _, out, _ = run("why", answers=answers)
    assert text in out


def test_why_without_a_trainer_says_how_to_start_one(run: Run) -> None:
    told = status(trainer={"alive": False, "idle_reason": None})
    answers: dict[str, Answer] = {
        "GET /noria/v1/status": told,
        "GET /noria/v1/jobs": page(),
        "GET /noria/v1/rollouts": page(),
    }
    _, out, _ = run("why", answers=answers)
    assert "no trainer runs; start one with `noria up`" in out


def test_retrain_asks_for_what_was_said(run: Run) -> None:
    said = ["dpo.beta=0.2", "modules.language_model.rank=8"]
    given = ["--method", "dpo", "--rollout", "none", "--settings", said[0], "--settings", said[1]]
    code, out, _ = run("retrain", *given, answers={"POST /noria/v1/jobs": job("queued")})
    assert (code, out) == (0, "job_1 queued\n")
    settings = {"dpo": {"beta": 0.2}, "modules": {"language_model": {"rank": 8}}}
    body = {"method": "dpo", "settings": settings, "rollout": "none"}
    assert run.asked == [("POST /noria/v1/jobs", body)]  # type: ignore[attr-defined]


def test_retrain_names_any_method_with_its_settings(run: Run) -> None:
    given = ["--method", "kto", "--settings", "kto.desirable_weight=1.5"]
    code, _, _ = run("retrain", *given, answers={"POST /noria/v1/jobs": job("queued", method="kto")})
    assert code == 0
    body = {"method": "kto", "settings": {"kto": {"desirable_weight": 1.5}}}
    assert run.asked == [("POST /noria/v1/jobs", body)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ended", "status_code", "said"),
    [
        (job(version="v2"), 0, "job_1 succeeded, made v2"),
        (job("failed", stage="train", error={"message": "loss is nan"}), 6, "failed at stage train: loss is nan"),
        (job("cancelled", stage="merge"), 5, "cancelled at stage merge"),
        (job(version="v2", metrics={"rollout": {"state": "failed", "reason": "NaN"}}), 5, "its rollout failed: NaN"),
    ],
)
def test_a_waited_for_job_is_the_exit_status(run: Run, ended: dict[str, object], status_code: int, said: str) -> None:
    events = [event(1, "stage", stage="train", progress=0.1), event(2, "metrics", loss=0.6, step=1)]
    answers: dict[str, Answer] = {"POST /noria/v1/jobs": job("queued"), EVENTS: {"events": events}, JOB: ended}
    code, out, err = run("retrain", "--wait", answers=answers)
    assert code == status_code
    assert said in out + err


def test_jobs_are_listed_shown_watched_cancelled(run: Run) -> None:
    failed = job("failed", stage="verify", progress=0.8, error={"message": "KL 0.9 above 0.5"}, metrics={"kl": 0.9})
    answers: dict[str, Answer] = {
        "GET /noria/v1/jobs": page(failed),
        JOB: failed,
        EVENTS: {"events": [event(1, "state", state="running"), event(2, "metrics", loss=0.5)]},
        f"POST {JOB.split()[1]}/cancel": job("running"),
    }
    for command in (("jobs",), ("jobs", "list")):
        code, out, _ = run(*command, answers=answers)
        assert code == 0
        assert out.splitlines()[1].split()[:5] == ["job_1", "failed", "verify", "80", "%"]
    assert json.loads(run("jobs", "--json", answers=answers)[1])[0]["id"] == "job_1"
    assert "measured kl  0.9" in run("jobs", "show", "job_1", answers=answers)[1]
    code, out, err = run("jobs", "watch", "job_1", "--json", answers=answers)
    assert code == 6
    assert [json.loads(line)["seq"] for line in out.splitlines()] == [1, 2]
    assert "KL 0.9 above 0.5" in err
    assert run("jobs", "cancel", "job_1", answers=answers)[1] == "job_1 running, asked to stop\n"


def test_versions_are_listed_and_shown(run: Run) -> None:
    """A trained version has its figures side by side, an added model under what measured them."""
    added: Json = {
        "id": "v1",
        "state": "retired",
        "parent": None,
        "method": "base",
        "job": None,
        "created_at": 1e9,
    }
    added |= {"metrics": {"quantize": {"linears": 14, "seconds": 3.5}, "verify": {"mean_kl": 0.02, "agreement": 0.9}}}
    version: Json = {
        "id": "v2",
        "state": "live",
        "parent": "v1",
        "method": "dpo",
        "job": "job_1",
        "created_at": 1e9,
    }
    version |= {"metrics": {"mean_kl": 0.012, "counts": {"used": 3}}, "frozen": {"vision_tower": "sha256:ab"}}
    answers: dict[str, Answer] = {"GET /noria/v1/versions": page(version, added)}
    answers |= {f"GET /noria/v1/versions/{one['id']}": one for one in (version, added)}
    code, out, _ = run("versions", answers=answers)
    assert code == 0
    at = ["2001-09-09", "01:46:40Z"]
    assert out.splitlines()[1].split() == ["v2", "live", "v1", "dpo", "job_1", *at, "mean_kl=0.012"]
    assert out.splitlines()[2].split() == ["v1", "retired", "-", "base", "-", *at, "mean_kl=0.02", "agreement=0.9"]
    shown = [" ".join(run("versions", "show", name, answers=answers)[1].split()) for name in ("v1", "v2")]
    assert "measured quantize seconds 3.5 measured verify mean_kl 0.02 measured verify agreement 0.9" in shown[0]
    assert "frozen vision_tower sha256:ab measured mean_kl 0.012 measured counts used 3" in shown[1]
    assert run("versions", "show", "v9", answers=answers)[0] == 4


def test_a_rollout_is_followed_and_a_failed_one_fails(run: Run) -> None:
    begun = rollout("queued")
    ended = rollout(metrics={"pause_s": 1.25})
    answers: dict[str, Answer] = {"POST /noria/v1/rollouts": begun, "GET /noria/v1/rollouts/roll_1": ended}
    code, out, _ = run("rollout", "v2", answers=answers)
    assert (code, out) == (0, "v2 succeeded, traffic waited 1.25 s (before: v1)\n")
    answers["GET /noria/v1/rollouts/roll_1"] = rollout("failed", reason="tensor x is NaN")
    code, _, err = run("rollout", "v2", answers=answers)
    assert code == 5
    assert "tensor x is NaN" in err
    run("rollout", "v2", "--canary", "10", "--no-wait", answers=answers)
    body = {"version": "v2", "strategy": "canary", "percent": 10}
    assert ("POST /noria/v1/rollouts", body) in run.asked  # type: ignore[attr-defined]


@pytest.mark.parametrize(("refusal", "code"), [(Conflict("no previous"), 5), (NotFound("no v9"), 4)])
def test_refusals_exit_as_the_table_says(run: Run, refusal: Answer, code: int) -> None:
    got, out, err = run("rollback", answers={"POST /noria/v1/rollback": refusal})
    assert (got, out) == (code, "")
    assert err in ("noria: no previous\n", "noria: no v9\n")


def test_a_wrong_option_exits_2(run: Run) -> None:
    assert run("status", "--nope")[0] == 2
    assert run("retrain", "--settings", "beta")[0] == 2


def test_a_wrong_setting_is_one_line_and_exit_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "noria.toml").write_text("[server]\nhtp_port = 1\n")
    code, _, err = run("config", "show")
    assert code == 2
    assert err.splitlines()[0].startswith("noria: server.htp_port:")


def test_config_show_is_toml_that_loads_again(run: Run, tmp_path: Path) -> None:
    (tmp_path / "noria.toml").write_text('[server]\nhttp_port = 9\napi_key = "hush"\n[engine]\nargs = ["--x", "ü"]\n')
    code, out, _ = run("config", "show")
    assert code == 0
    tree = tomllib.loads(out)
    assert (tree["server"]["http_port"], tree["engine"]["args"]) == (9, ["--x", "ü"])
    assert "hush" not in out
    as_json = json.loads(run("config", "show", "--json")[1])
    assert as_json["server"]["api_key"] == "**********"
    assert as_json["train"]["policy"]["min_preferences"] == tree["train"]["policy"]["min_preferences"]


def test_settings_pairs_nest() -> None:
    assert nested(["a.b=1", "a.c=x y", "d=[1, 2]", "e=true"]) == {"a": {"b": 1, "c": "x y"}, "d": [1, 2], "e": True}
    for wrong in (["a"], ["=1"], ["a..b=1"], ["a=1", "a.b=2"]):
        with pytest.raises(InvalidRequest):
            nested(wrong)
