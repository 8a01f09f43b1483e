"""Sampling from real vLLM on GPTQ weights: exact tokens and log-probabilities, adapters that come and go, users first.

One server for the whole file, on v1 of two versions, with room for two adapters. What the engine says of its own
tokens is held against torch in float32 over the very same ids. The engine computes in bfloat16: TOLERANCE_NATS is the
mean |difference| that is allowed (0.02 to 0.03 were seen); another policy, or another temperature, is far beyond it.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import httpx
import pytest

from noria.client import NoriaClient
from noria.errors import NotFound, Superseded
from noria.records import Json
from noria.sampling import Drawing, Group, SamplingPool
from noria.sampling.places import Place, place_at
from tests.flow.policies import SMALL, Policy, picture, publish_both, write_lora
from tests.servers import Server, start_server

TOLERANCE_NATS = 0.06
TEXT: list[Json] = [{"role": "user", "content": "Tell me of the red square"}]
SHOWN: list[Json] = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": picture((210, 40, 30))}},
            {"type": "text", "text": "Which colour?"},
        ],
    }
]
SETTINGS = {**SMALL, "VLLM_SERVER_DEV_MODE": "1", "NORIA_ENGINE__POLICY_ADAPTERS": "2"}


@dataclass
class World:
    """A running server, its two versions, adapters for v1, and the policies in torch by adapter."""

    server: Server
    noria: NoriaClient
    place: Place
    adapters: dict[str, Path]
    policies: dict[str | None, Policy] = field(default_factory=dict)

    def serving(self) -> Path:
        """The checkpoint of v1."""
        return self.server.home / "models" / "v1" / "serving"

    def policy(self, adapter: str | None) -> Policy:
        """What training would compute with."""
        if adapter not in self.policies:
            self.policies[adapter] = Policy(self.serving(), self.adapters[adapter] if adapter else None)
        return self.policies[adapter]

    def put(self, adapter: str, ttl_s: float = 600.0) -> None:
        """Loads one of the adapters."""
        self.place.put_adapter(adapter, "v1", ttl_s, self.adapters[adapter])

    def engine_adapters(self) -> str:
        """The numbers of the adapters that the worker holds, as it says."""
        answer = httpx.post(f"{self.server.url}/collective_rpc", json={"method": "list_loras"}, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["results"][0])

    def metric(self, name: str) -> float:
        """One of the server's counters."""
        lines = httpx.get(f"{self.server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def roll_out(self, version: str) -> None:
        """Rolls a version out and waits for it."""
        assert self.noria.wait_rollout(self.noria.create_rollout(version)["id"], poll_s=0.05)["state"] == "succeeded"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The server on v1."""
    home, scratch = tmp_path_factory.mktemp("sampling-home"), tmp_path_factory.mktemp("sampling")
    publish_both(home, scratch)
    adapters = {name: write_lora(scratch / "v1", scratch / name, seed) for seed, name in enumerate(("one", "two"))}
    with start_server(home, **SETTINGS) as server, NoriaClient(server.url) as noria:
        place = place_at(f"grpc://{server.grpc}")
        yield World(server, noria, place, adapters)
        place.close()


@pytest.fixture(autouse=True)
def clean(world: World) -> Iterator[None]:
    """Every test begins on v1 and leaves no adapter."""
    if world.noria.status()["serving"] != "v1":
        world.roll_out("v1")
    yield
    for one in world.place.list_adapters()["data"]:
        world.place.delete_adapter(one["name"])


def differences(policy: Policy, messages: Sequence[Json], group: Json, temperature: float = 1.0) -> list[float]:
    """|engine - torch| of every sampled token, over the engine's own ids.

    A sample that says a picture's token is left out: torch would look for the picture.
    """
    found, placeholder = [], policy.processor.tokenizer.convert_tokens_to_ids("<image>")
    for sample in group["samples"]:
        if placeholder in sample["token_ids"]:
            continue
        expected = policy.logprobs(messages, group["prompt_token_ids"], sample["token_ids"], temperature)
        found += [abs(a - b) for a, b in zip(sample["logprobs"], expected, strict=True)]
    return found


@pytest.mark.parametrize("messages", [TEXT, SHOWN], ids=["text", "picture"])
@pytest.mark.parametrize("adapter", [None, "one"])
def test_ids_and_log_probabilities_are_the_policy_s_own(
    world: World, messages: list[Json], adapter: str | None
) -> None:
    if adapter:
        world.put(adapter)
    group = world.place.sample({"messages": messages, "n": 8, "max_tokens": 24, "seed": 11, "adapter": adapter})
    assert group["version"] == "v1" and group["adapter"] == adapter and group["logprobs_temperature"] == 1.0
    assert group["prompt_token_ids"] == world.policy(None).prompt_ids(messages)
    if messages is SHOWN:
        placeholder = world.policy(None).processor.tokenizer.convert_tokens_to_ids("<image>")
        assert group["prompt_token_ids"].count(placeholder) == 16
    assert len({tuple(one["token_ids"]) for one in group["samples"]}) > 4
    tokenizer = world.policy(None).processor.tokenizer
    for one in group["samples"]:
        assert (one["finish_reason"] == "stop") == (one["token_ids"][-1] == tokenizer.eos_token_id)
        assert one["text"] == tokenizer.decode(one["token_ids"], skip_special_tokens=True)
        assert one["finish_reason"] == "stop" or len(one["token_ids"]) == 24
    found = differences(world.policy(adapter), messages, group)
    wrong = differences(world.policy(None if adapter else "one"), messages, group)
    print(f"{adapter}, {len(found)} tokens: mean {statistics.mean(found):.4f}, most {max(found):.4f} nats; "
          f"the other policy: {statistics.mean(wrong):.3f}")  # fmt: skip
    assert statistics.mean(found) < TOLERANCE_NATS
    assert statistics.mean(wrong) > 20 * TOLERANCE_NATS


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_log_probabilities_are_taken_at_the_temperature_that_was_drawn_at(world: World, temperature: float) -> None:
    """While a user's own, in the same batch, stay as they are: raw, whatever the temperature."""
    body = {"messages": TEXT, "n": 8, "max_tokens": 24, "temperature": temperature, "top_p": 0.9}
    ask: Json = {"model": "noria", "messages": SHOWN, "temperature": 0.3, "seed": 1, "logprobs": True, "store": False}
    with ThreadPoolExecutor() as threads:
        sampling = threads.submit(world.place.sample, body)
        user = httpx.post(f"{world.server.url}/v1/chat/completions", json={**ask, "max_tokens": 12}, timeout=60).json()
        group = sampling.result()
    assert group["logprobs_temperature"] == temperature
    assert statistics.mean(differences(world.policy(None), TEXT, group, temperature)) < TOLERANCE_NATS
    assert statistics.mean(differences(world.policy(None), TEXT, group, 1.0)) > 4 * TOLERANCE_NATS
    alone = httpx.post(f"{world.server.url}/v1/chat/completions", json={**ask, "max_tokens": 12}, timeout=60).json()
    told = [[one["logprob"] for one in said["choices"][0]["logprobs"]["content"]] for said in (user, alone)]
    assert told[0] == pytest.approx(told[1], abs=0.1)


def test_users_cannot_name_an_adapter(world: World) -> None:
    """Not by its name, not by the engine's, not by its number; and it is nowhere listed."""
    world.put("one")
    models = httpx.get(f"{world.server.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["noria", "v1"]
    number = world.engine_adapters().strip("{}set()")
    for name in ("one", f"noria-policy/{number}/one", number, "v1+one"):
        for path, body in (
            ("chat/completions", {"messages": TEXT}),
            ("completions", {"prompt": "a"}),
            ("responses", {"input": "a"}),
        ):
            refused = httpx.post(f"{world.server.url}/v1/{path}", json={"model": name, **body}, timeout=60)
            assert refused.status_code == 404, (name, path, refused.text)
    greedy: Json = {"model": "noria", "messages": TEXT, "temperature": 0, "max_tokens": 16, "store": False}
    said = httpx.post(f"{world.server.url}/v1/chat/completions", json=greedy, timeout=60).json()
    base = world.place.sample({"messages": TEXT, "temperature": 0, "max_tokens": 16})
    other = world.place.sample({"messages": TEXT, "temperature": 0, "max_tokens": 16, "adapter": "one"})
    assert said["choices"][0]["message"]["content"] == base["samples"][0]["text"] != other["samples"][0]["text"]


def test_an_adapter_leaves_the_engine_after_its_lease(world: World) -> None:
    world.put("one", ttl_s=2.0)
    world.put("two")
    assert len(world.engine_adapters().split(",")) == 2
    until = time.monotonic() + 30
    while len(world.place.list_adapters()["data"]) == 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(world.engine_adapters().split(",")) == 1
    with pytest.raises(NotFound):
        world.place.sample({"messages": TEXT, "adapter": "one"})
    assert world.place.sample({"messages": TEXT, "adapter": "two"})["adapter"] == "two"
    left = {path.name.partition("-")[2] for path in (world.server.home / "policy-adapters").glob("*/*")}
    assert left == {"two"}


def test_a_swap_in_the_middle_of_groups(world: World) -> None:
    """They end, their adapters are gone before the weights are, users' answers go on; nothing is mixed."""
    world.put("one")
    long: Json = {"messages": TEXT, "n": 12, "max_tokens": 200}
    with ThreadPoolExecutor() as threads:
        groups = [threads.submit(world.place.sample, {**long, "adapter": name}) for name in ("one", None)]
        until = time.monotonic() + 30
        while world.metric("noria_sampling_running") < 12:
            assert time.monotonic() < until and not any(group.done() for group in groups)
            time.sleep(0.01)
        world.roll_out("v2")
        for group in groups:
            assert isinstance(group.exception(), Superseded)
    assert world.engine_adapters() in ("set()", "{}", "[]") and world.place.list_adapters()["data"] == []
    after = world.place.sample({"messages": TEXT, "max_tokens": 8})
    assert after["version"] == "v2" and after["fingerprint"].startswith("v2-")
    with pytest.raises(Superseded):
        world.put("one")
    world.roll_out("v1")
    world.put("one")  # the same bytes under the same name, beside the same version
    again = world.place.sample({"messages": SHOWN, "n": 4, "max_tokens": 16, "adapter": "one"})
    assert statistics.mean(differences(world.policy("one"), SHOWN, again)) < TOLERANCE_NATS


def test_a_picture_that_waits_with_its_samples_is_there_for_users(world: World) -> None:
    """vLLM's two caches of images mirror each other: what sampling has prepared, the engine has to know."""
    fresh = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture((1, 2, 3))}}]}]
    user: Json = {"model": "noria", "max_tokens": 200, "ignore_eos": True, "store": False}
    with httpx.Client(base_url=world.server.url, timeout=60) as http, ThreadPoolExecutor() as threads:
        with http.stream("POST", "/v1/chat/completions", json={**user, "messages": TEXT, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)  # a user is inside from here on: one sample runs, the others wait
            groups = [threads.submit(world.place.sample, {"messages": one, "n": 2}) for one in (TEXT, fresh)]
            until = time.monotonic() + 30
            while world.metric("noria_sampling_waiting") < 3:
                assert time.monotonic() < until
                time.sleep(0.01)
            answer = http.post("/v1/chat/completions", json={**user, "messages": fresh, "max_tokens": 4})
            assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length", answer.text
            assert len(list(lines)) > 100
        for group in groups:
            assert len(group.result()["samples"]) == 2


def test_beside_a_user_samples_get_one_token_a_step(world: World) -> None:
    """Counted and not timed: all samples together say no more than one token while a user's answer gets one, some 60
    here and never more than the answer has; in the 15 seats that are theirs when nobody is there they would say 900."""
    user: Json = {"model": "noria", "messages": TEXT, "max_tokens": 200, "ignore_eos": True, "store": False}
    with httpx.Client(base_url=world.server.url, timeout=60) as http, ThreadPoolExecutor() as threads:
        group = threads.submit(world.place.sample, {"messages": TEXT, "n": 64, "max_tokens": 200})
        until = time.monotonic() + 30
        while world.metric("noria_sampling_running") < 16:
            assert time.monotonic() < until and not group.done()
            time.sleep(0.01)
        with http.stream("POST", "/v1/chat/completions", json={**user, "stream": True}) as answer:
            chunks = (line for line in answer.iter_lines() if line.startswith("data: {"))
            told = []
            for wait in (20, 60):
                assert len(list(islice(chunks, wait))) == wait
                told.append(world.metric("noria_sampling_tokens_total"))
            assert not group.done()
        assert 0 < told[1] - told[0] < 300
        assert len(group.result()["samples"]) == 64


def family(pid: int) -> list[int]:
    """A process and all that it has started, and they."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(one for thread in threads for child in thread.read_text().split() for one in family(int(child)))]


def worked_s(pids: Sequence[int]) -> float:
    """The processor time that they have had, in seconds: others who load the machine are not in it."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


async def first_token_s(http: httpx.AsyncClient, number: int, pids: Sequence[int]) -> float:
    """The server's work until a user's streamed answer shows its first token; the answer is read to its end."""
    body: Json = {"model": "noria", "messages": [{"role": "user", "content": f"What is {number}?"}], "store": False}
    started, first = worked_s(pids), 0.0
    async with http.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 12, "ignore_eos": True}
    ) as answer:
        async for line in answer.aiter_lines():
            if not first and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                first = worked_s(pids) - started
    return first


async def load(server: Server, requests: int) -> list[float]:
    """Two users with a pause between their questions; the server's work until their first tokens."""
    found: list[float] = []
    pids = family(server.process.pid)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:

        async def user(number: int) -> None:
            for turn in range(requests // 2):
                found.append(await first_token_s(http, number * 1000 + turn, pids))
                await asyncio.sleep(0.3)

        await asyncio.gather(user(1), user(2))
    return found


def p95(times: Sequence[float]) -> float:
    """The 95th percentile: of 24 times the slowest one does not count."""
    return statistics.quantiles(times, n=20, method="inclusive")[-1]


def beside_sampling(world: World, groups: list[Group]) -> tuple[float, float]:
    """The users' p95 while groups are sampled from adapter `one`, and how many samples were set back for it."""
    before, over = world.metric("noria_sampling_set_back"), threading.Event()

    def prompts() -> Iterator[list[Json]]:
        while not over.is_set():
            yield SHOWN

    def sample(pool: SamplingPool) -> None:
        groups.extend(pool.sample(prompts(), Drawing(n=8, max_tokens=150), adapter="one", version="v1"))

    with SamplingPool([world.server.url], concurrency=2) as pool, ThreadPoolExecutor() as threads:
        sampling = threads.submit(sample, pool)
        try:
            beside = asyncio.run(load(world.server, 24))
        finally:
            over.set()
        sampling.result()
    return p95(beside), world.metric("noria_sampling_set_back") - before


def test_samples_give_way_to_users_and_are_none_the_worse_for_it(world: World) -> None:
    """What the server works until a user's first token stays near what it is alone (loosely here, and by its own
    processor time; `benchmarks/sampling.py` measures on the clock), and a sample that was set back and went on has the
    log-probabilities of one that was not."""
    world.put("one")
    asyncio.run(load(world.server, 4))
    groups: list[Group] = []
    alone = p95(asyncio.run(load(world.server, 24)))
    beside, set_back = beside_sampling(world, groups)
    print(f"p95 to first token: alone {alone:.3f} s, beside sampling {beside:.3f} s; set back {set_back:.0f}")
    assert set_back > 0 and len(groups) >= 1
    assert beside < 4 * alone + 0.1
    returned = [(group, one) for group in groups for one in group.samples if one.turns > 1]
    told: list[Json] = [{"prompt_token_ids": group.prompt_token_ids, "samples": [vars(one)]} for group, one in returned]
    found = [differences(world.policy("one"), SHOWN, one) for one in told[:10]]
    assert any(found)
    assert all(statistics.mean(one) < TOLERANCE_NATS for one in found if one)
    assert world.noria.status()["completions"] == 0  # neither users here nor sampling are captured
