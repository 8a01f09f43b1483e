"""A judge over real HTTP: what it is asked, how strictly it is read, and what busy, broken and slow ones cost."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from noria.errors import SettingsError, TrainingError
from noria.records import BLOB_SCHEME, Json
from noria.rewards import JudgeOptions
from train.rewards import Backing, Failure, Sample
from train.rewards.outside.judge import JudgeReward

KEY = "sk-hush-hush"
Answer = Callable[["Judge", int, Json], Any]


class Judge(ThreadingHTTPServer):
    """Answers each request, by number from 0, with what a function says: a text, a status, or bytes; keeps them all."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.asked: list[Json] = []
        self.keys: set[str | None] = set()
        self.paths: set[str] = set()
        self.inside = self.most = 0
        self.lock = threading.Lock()
        self.ending = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        judge = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with judge.lock:
            number = len(judge.asked)
            judge.asked.append(body)
            judge.keys.add(self.headers.get("authorization"))
            judge.paths.add(self.path)
            judge.inside += 1
            judge.most = max(judge.most, judge.inside)
        told = judge.answer(judge, number, body)
        with judge.lock:
            judge.inside -= 1
        if isinstance(told, int):
            self._send(told, b"{}")
        elif isinstance(told, bytes):
            self._send(200, told)
        else:
            self._send(200, json.dumps({"choices": [{"message": {"content": told}}]}).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Judge]]:
    """Starts judges and ends them."""
    started: list[Judge] = []

    def one(answer: Answer) -> Judge:
        started.append(Judge(answer))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return started[-1]

    yield one
    for judge in started:
        judge.ending.set()
        judge.shutdown()
        judge.server_close()


def reward(judge: Judge | int, backing: Backing | None = None, **options: Any) -> JudgeReward:
    port = judge if isinstance(judge, int) else judge.server_address[1]
    told = {"url": f"http://127.0.0.1:{port}/v1", "model": "m", "rubric": "Short is good.", "backoff_s": 0.0, **options}
    return JudgeReward(JudgeOptions(**told), backing or Backing())


def says(score: Any) -> str:
    return json.dumps({"reason": "so it is", "score": score})


def samples(*texts: str) -> list[Sample]:
    return [Sample([{"role": "user", "content": "what is it"}], text) for text in texts]


def test_marks_are_put_on_a_scale_of_one(serve: Any) -> None:
    judge = serve(lambda judge, number, body: says([0, 7.5, 10, 4][number]))
    made = reward(judge, concurrency=1)
    assert made(samples("a", "b", "c")) == [0.0, 0.75, 1.0]
    assert reward(judge, lowest=1, highest=5)(samples("d")) == [0.75]
    assert judge.paths == {"/v1/chat/completions"}
    assert judge.keys == {None}


def test_what_the_judge_is_asked(serve: Any) -> None:
    judge = serve(lambda judge, number, body: says(1))
    sample = Sample([{"role": "user", "content": "what {is} it"}], "a red {square}", answers=("red",))
    reward(judge, rubric="Say {colour}.", temperature=0.5, max_tokens=9)([sample, sample])
    reward(judge, show_answers=False, response_format="none")([sample])
    reward(judge, response_format="json_object")([sample])
    first, second, third, fourth = judge.asked
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.5, 9)
    system, user = first["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Say {colour}." in system["content"]
    assert "from 0 (worst) to 10 (best)" in system["content"]
    for part in ("what {is} it", "right answers]\nred", "answer to be marked]\na red {square}\n"):
        assert part in user["content"]
    assert user["content"] != second["messages"][1]["content"]  # the marks around the answer are drawn each time
    schema = first["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reason", "score"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 0.0, "maximum": 10.0}
    assert "right answers" not in third["messages"][1]["content"]
    assert "response_format" not in third
    assert fourth["response_format"] == {"type": "json_object"}


def test_pictures_are_shown_as_the_judge_can_read_them(serve: Any) -> None:
    judge = serve(lambda judge, number, body: says(10))
    data = "data:image/png;base64,AAAA"
    urls = (f"{BLOB_SCHEME}red", data)
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": "both?"}]
    sample = Sample([{"role": "user", "content": content}], "yes")
    loaded: list[str] = []

    def load(reference: str) -> Image.Image:
        loaded.append(reference)
        return Image.new("RGB", (2, 2), reference.removeprefix(BLOB_SCHEME))

    assert reward(judge, Backing(load_image=load))([sample]) == [1.0]
    parts = judge.asked[0]["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert parts[2]["image_url"]["url"] == data
    assert loaded == [f"{BLOB_SCHEME}red"]
    assert reward(judge)([sample]) == [Failure("unreadable picture")]
    assert reward(judge, pictures=False)([sample]) == [1.0]
    assert judge.asked[1]["messages"][1]["content"].count("(a picture)") == 2


def test_a_picture_that_is_gone_costs_its_sample(serve: Any) -> None:
    def load(reference: str) -> Image.Image:
        raise TrainingError("it is gone")

    shown = {"type": "image_url", "image_url": {"url": f"{BLOB_SCHEME}x"}}
    judge = serve(lambda judge, number, body: says(10))
    gone = Sample([{"role": "user", "content": [shown]}], "a")
    assert reward(judge, Backing(load_image=load))([gone, *samples("b")]) == [Failure("unreadable picture"), 1.0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"score": 5}', 0.5),
        (' {"score": 5, "reason": "fine"}\n', 0.5),
        ('```json\n{"score": 5}\n```', Failure("not the JSON asked for")),
        ('The mark: {"score": 5}', Failure("not the JSON asked for")),
        ('{"score": 5} {"score": 6}', Failure("not the JSON asked for")),
        ('{"score": "5"}', Failure("not the JSON asked for")),
        ('{"score": true}', Failure("not the JSON asked for")),
        ('{"score": null}', Failure("not the JSON asked for")),
        ('{"score": 5, "reason": 7}', Failure("not the JSON asked for")),
        ('{"score": 5, "more": 7}', Failure("not the JSON asked for")),
        ('{"reason": "none"}', Failure("not the JSON asked for")),
        ("5", Failure("not the JSON asked for")),
        ("[5]", Failure("not the JSON asked for")),
        ("", Failure("not the JSON asked for")),
        ('{"score": 10.5}', Failure("off the scale")),
        ('{"score": -1}', Failure("off the scale")),
        ('{"score": NaN}', Failure("off the scale")),
        ('{"score": 1' + "0" * 400 + "}", Failure("off the scale")),
        (b"not json", Failure("no completion")),
        (b'{"choices": []}', Failure("no completion")),
        (b'{"choices": [{"message": {"content": null}}]}', Failure("no completion")),
        (400, Failure("refused 400")),
        (401, Failure("refused 401")),
    ],
)
def test_its_answer_is_read_strictly_and_once(serve: Any, text: Any, wanted: Any) -> None:
    judge = serve(lambda judge, number, body: text)
    assert reward(judge)(samples("a")) == [wanted]
    assert len(judge.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_judge_is_asked_again(serve: Any, status: int) -> None:
    judge = serve(lambda judge, number, body: status if number < 2 else says(10))
    assert reward(judge, retries=2)(samples("a")) == [1.0]
    assert len(judge.asked) == 3
    still = serve(lambda judge, number, body: status)
    assert reward(still, retries=1)(samples("a")) == [Failure("unavailable")]
    assert len(still.asked) == 2


def test_nobody_there_costs_the_samples(free_port: int) -> None:
    assert reward(free_port, retries=1)(samples("a", "b")) == [Failure("unavailable")] * 2


def test_a_judge_that_hangs_costs_its_sample(serve: Any) -> None:
    def slow(judge: Judge, number: int, body: Json) -> Any:
        if "hang" in body["messages"][1]["content"]:
            judge.ending.wait(60)
        return says(10)

    judge = serve(slow)
    assert reward(judge, timeout_s=3.0, retries=0)(samples("a", "hang", "b")) == [1.0, Failure("timeout"), 1.0]
    assert reward(judge, timeout_s=0.5, retries=1)(samples("hang")) == [Failure("timeout")]


def test_a_judge_that_drips_is_not_waited_for(free_port: int) -> None:
    """Each byte comes in time, the answer does not."""
    import socket

    ending = threading.Event()
    listening = socket.create_server(("127.0.0.1", free_port))

    def drip() -> None:
        peer, _ = listening.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not ending.wait(0.05):
                try:
                    peer.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        assert reward(free_port, timeout_s=1.0, retries=0)(samples("a")) == [Failure("timeout")]
    finally:
        ending.set()
        thread.join()
        listening.close()


def test_no_more_than_so_many_are_asked_at_once(serve: Any) -> None:
    def slow(judge: Judge, number: int, body: Json) -> str:
        time.sleep(0.1)
        return says(10)

    judge = serve(slow)
    assert reward(judge, concurrency=3)(samples(*"abcdefghi")) == [1.0] * 9
    assert judge.most == 3


def test_it_works_inside_a_running_loop(serve: Any) -> None:
    import asyncio

    judge = serve(lambda judge, number, body: says(10))

    async def inside() -> Any:
        return reward(judge)(samples("a"))

    assert asyncio.run(inside()) == [1.0]


def test_the_key_comes_from_the_environment_and_is_never_told(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge = serve(lambda judge, number, body: 401)
    with pytest.raises(SettingsError, match="JUDGE_KEY holds no key"):
        reward(judge, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    made = reward(judge, api_key_env="JUDGE_KEY")
    found = made(samples("a private answer"))
    assert judge.keys == {f"Bearer {KEY}"}
    assert found == [Failure("refused 401")]
    assert caplog.text
    for told in (caplog.text, repr(made), repr(made._options)):
        assert KEY not in told
        assert "private" not in told
