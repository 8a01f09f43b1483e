"""Keys before real vLLM: every one of its routes has its roles, and a running server keeps to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from noria.store import Store
from tests.contract.doors import GrpcDoor, HttpDoor, Refused
from tests.servers import publish_tiny, start_server

SMALL = {"NORIA_ENGINE__MAX_MODEL_LEN": "256", "NORIA_ENGINE__KV_CACHE_GIB": "0.5"}
ROUTES = """
import json
from serve.engine.launch import parse_flags
from vllm.entrypoints.launchers.app import build_app
from tests.unit.access.routes import roles_by_route
app = build_app(parse_flags(["--model=none", "--load-format=safetensors"]), ("generate",))
print(json.dumps([[*route, *roles] for route, roles in roles_by_route(app).items()]))
"""

VLLMS = """
GET  /openapi.json                       operator
GET  /docs                               operator
GET  /docs/oauth2-redirect               operator
GET  /redoc                              operator
GET  /load                               operator
GET  /version                            annotator client operator trainer
GET  /kv_event_sources                   operator
GET  /health                             operator
GET  /metrics                            annotator client operator trainer
POST /tokenize                           client
POST /detokenize                         client
GET  /v1/models                          annotator client operator trainer
GET  /ping                               operator
POST /ping                               operator
POST /invocations                        client
POST /v1/chat/completions                client
POST /v1/chat/completions/batch          client
POST /v1/responses                       client
GET  /v1/responses/{response_id}         client
POST /v1/responses/{response_id}/cancel  client
POST /v1/completions                     client
POST /v1/messages                        client
POST /v1/messages/count_tokens           client
POST /generative_scoring                 client
POST /scale_elastic_ep                   operator
POST /is_scaling_elastic_ep              operator
"""


def test_every_route_of_vllm_has_the_roles_of_this_list() -> None:
    """`/health` and `/ping` are open before the table is asked."""
    done = subprocess.run([sys.executable, "-c", ROUTES], capture_output=True, text=True, check=True)
    found = [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]
    assert sorted(found) == sorted(tuple(line.split()) for line in VLLMS.split("\n") if line)


def test_a_server_without_keys_does_not_start_for_others(tmp_path: Path) -> None:
    environment = {**os.environ, "NORIA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "serve", "--http-port=0", "--grpc-port=0", "--host=0.0.0.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no key is configured" in done.stderr and "noria keys create" in done.stderr
    assert not (tmp_path / "server.json").exists()


def test_a_running_server_keeps_to_its_keys(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    publish_tiny(home)
    with start_server(home, **SMALL) as server, Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        assert "only this machine" in server.log.read_text()
        assert HttpDoor(server.url).chat("hello", max_tokens=2)["choices"]  # nobody has made a key yet
        shop, shop_key = store.create_key("shop", ["client"])
        _, boss_key = store.create_key("boss", ["operator"])
        client, boss = HttpDoor(server.url, shop_key), HttpDoor(server.url, boss_key)
        until_asked(server.url)
        asked = [client.chat("hello", max_tokens=2)["id"], next(client.stream("and this", max_tokens=2))["id"]]
        grpc_client = GrpcDoor(server.grpc, shop_key)
        asked.append(grpc_client.chat("hi", max_tokens=2)["id"])
        asked.append(next(iter(list(grpc_client.stream("hi", max_tokens=2))))["id"])
        listed = client.client.get("/v1/chat/completions").json()["data"]
        assert {one["id"] for one in listed} == set(asked)
        assert {store.get_completion(id_).key_id for id_ in asked} == {shop.id}
        for door in (client, grpc_client):
            with pytest.raises(Refused) as refused:
                door.status()
            assert refused.value.message == "This call needs the role operator; the key 'shop' has client."
        assert client.client.get("/load").status_code == 403 and boss.client.get("/load").status_code == 200
        assert boss.client.post("/v1/completions", json={}).status_code == 403
        assert GrpcDoor(server.grpc, boss_key).status()["live"] == "v1"
        metrics = httpx.get(f"{server.url}/metrics")
        assert metrics.status_code == 200 and 'noria_access_refused_total{reason="forbidden"}' in metrics.text
        assert httpx.get(f"{server.url}/metrics", headers={"x-forwarded-for": "203.0.113.9"}).status_code == 401
        assert server.stop() == 0
        assert store.get_key("shop").last_used_at is not None


def until_asked(url: str) -> None:
    """Returns when the server has seen that there are keys."""
    for _ in range(600):
        if httpx.get(f"{url}/v1/models").status_code == 401:
            return
    raise AssertionError("the server never asked for a key")
