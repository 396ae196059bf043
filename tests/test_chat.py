"""Proves that the chat client asks, waits, tries again and gives up as it says, against a real server, and that it
never shows the key. pytest tests/test_chat.py
"""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tubelet.runtime import chat
from tubelet.runtime.chat import Endpoint, caption_messages, complete, image_parts, tidy
from tubelet.runtime.errors import UserError
from tubelet.runtime.sheet import shown_frames

KEY = "sk-never-shown"
MESSAGES = [{"role": "user", "content": "ein Ball \u2603"}]
FLOOD = 64 * 2**20


class Server(ThreadingHTTPServer):
    """Plays its answers in turn, the last one for ever, and keeps what it was asked."""

    def __init__(self, plays: tuple[Play, ...]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plays, self.asked, self.sent, self.over = plays, list[dict[str, Any]](), 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append({"path": self.path, "headers": self.headers, "body": json.loads(body)})
        self.server.plays[min(len(self.server.asked), len(self.server.plays)) - 1](self)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


Play = Callable[[Handler], None]


def answers(status: int, body: object = b"", **headers: str) -> Play:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda h: h.reply(status, data, {name.replace("_", "-"): value for name, value in headers.items()})


def says(content: object) -> Play:
    return answers(200, {"choices": [{"message": {"role": "assistant", "content": content}}]})


def echoes(status: int) -> Play:
    """A server that shows what it was sent, the key among it."""
    return lambda h: h.reply(status, str(h.headers).encode(), {"Location": f"/?{h.headers['Authorization']}"})


def babbles(h: Handler) -> None:
    h.wfile.write(f"{h.headers['Authorization']}\r\n\r\n".encode())


def hangs_up(h: Handler) -> None:
    h.close_connection = True


def breaks_off(h: Handler) -> None:
    h.reply(200, b'{"choices"', {"Content-Length": "1000"})


def hangs(h: Handler) -> None:
    h.server.over.wait(10)


def drips(h: Handler) -> None:
    h.reply(200, b"", {})
    while not h.server.over.wait(0.01):
        h.wfile.write(b" ")


def floods(h: Handler) -> None:
    h.reply(200, b"", {})
    while h.server.sent < FLOOD:
        h.server.sent += h.wfile.write(b" " * 2**16)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "*")
    servers = []

    def start(*plays: Play) -> Server:
        servers.append(server := Server(plays))
        server.handle_error = lambda *_: None  # a client that leaves early is part of the play
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited between tries."""
    seconds: list[float] = []
    monkeypatch.setattr(chat, "sleep", seconds.append)
    return seconds


def endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint(url, **({"model": "m-7b", "key": KEY, "timeout_s": 5.0, "retries": 2} | changes))


# Asking.


@pytest.mark.parametrize("slash", ["", "/"])
def test_it_posts_the_messages_and_returns_the_text(serve: Callable[..., Server], slash: str) -> None:
    server = serve(says(" Ein gr\u00fcner Ball.\n"))

    assert complete(endpoint(server.url + slash), MESSAGES) == " Ein gr\u00fcner Ball.\n"

    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["body"] == {"model": "m-7b", "messages": MESSAGES}
    assert asked["headers"]["Authorization"] == f"Bearer {KEY}"
    assert asked["headers"]["Content-Type"] == "application/json"


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_no_authorization_is_sent(serve: Callable[..., Server], key: str | None) -> None:
    server = serve(says("text"))

    complete(endpoint(server.url, key=key), MESSAGES)

    assert "Authorization" not in server.asked[0]["headers"]


def test_half_a_surrogate_pair_in_the_answer_is_dropped(serve: Callable[..., Server]) -> None:
    server = serve(answers(200, rb'{"choices": [{"message": {"content": "a \ud83d ball"}}]}'))

    assert complete(endpoint(server.url), MESSAGES) == "a  ball"


def test_a_message_that_is_no_text_is_refused_before_asking() -> None:
    with pytest.raises(UserError, match=r"a message holds '\\udcff', which is no text"):
        complete(endpoint("http://127.0.0.1:9"), [{"role": "user", "content": "a \udcff ball"}])


def test_without_httpx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)

    assert "httpx" not in vars(chat)
    with pytest.raises(UserError, match=r"httpx.*install tubelet\[chat\]"):
        complete(endpoint("http://127.0.0.1:9"), MESSAGES)


# Trying again.


@pytest.mark.parametrize("failure", [*map(answers, (408, 429, 500, 502, 503, 529)), hangs_up, breaks_off, babbles])
def test_what_may_pass_is_tried_again(serve: Callable[..., Server], waits: list[float], failure: Play) -> None:
    server = serve(failure, failure, says("text"))

    assert complete(endpoint(server.url), MESSAGES) == "text"

    assert len(server.asked) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_tries_are_counted(serve: Callable[..., Server], waits: list[float]) -> None:
    for retries in (0, 1, 3):
        server = serve(answers(503, {"error": {"message": "overloaded"}}))
        with pytest.raises(UserError, match=r"answered 503 for model 'm-7b' .*overloaded.*; its server is at fault"):
            complete(endpoint(server.url, retries=retries), MESSAGES)
        assert len(server.asked) == retries + 1
    assert len(waits) == 0 + 1 + 3


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0.5),
        ("86400", 30, 30),
        ("9" * 400, 30, 30),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 30, 30),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0.5),
        ("Wed, 21 Oct 2099 07:28:00 -0000", 0, 0.5),
        ("-3", 0, 0.5),
        ("soon", 0, 0.5),
    ],
)
def test_retry_after_is_honoured_up_to_a_cap(
    serve: Callable[..., Server], waits: list[float], asked: str, least: float, most: float
) -> None:
    server = serve(answers(429, Retry_After=asked), says("text"))

    assert complete(endpoint(server.url), MESSAGES) == "text"

    assert len(server.asked) == 2
    assert least <= waits[0] <= most


def test_a_closed_port_is_unreachable(serve: Callable[..., Server], waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    with pytest.raises(UserError, match=rf"cannot reach http://127.0.0.1:{port}/chat/completions .*start its server"):
        complete(endpoint(f"http://127.0.0.1:{port}"), MESSAGES)

    assert len(waits) == 2


# Giving up.


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (answers(400, {"error": "no such model"}), r"answered 400 .*no such model.*check the model's name"),
        (answers(401), "answered 401 .*; set TUBELET_CHAT_KEY to a key that it accepts"),
        (answers(403), "answered 403 .*; give TUBELET_CHAT_KEY a key that may use this model"),
        (answers(404), "/v1/chat/completions answered 404 for model 'm-7b' .*; mend the url .* or the model's name"),
        (answers(418, b"x" * 9999), r"answered 418 .*\('x{200}'\); see its words"),
        (answers(200, b"<html>"), r"answered no JSON \('<html>'\)"),
        (answers(200, b"[" * 100_000), "answered no JSON"),
        (answers(200, b"\xff\xfe"), "answered no JSON"),
        (answers(200, []), r"without choices\[0\].message.content"),
        (answers(200, {"choices": []}), r"without choices\[0\].message.content"),
        (answers(200, {"error": "quota"}), r"without choices\[0\].message.content .*quota"),
        (says(None), r"without choices\[0\].message.content"),
        (says([{"type": "text", "text": "hi"}]), r"without choices\[0\].message.content"),
        (says(" \n"), "answered an empty text"),
    ],
)
def test_what_will_not_pass_is_asked_once(
    serve: Callable[..., Server], waits: list[float], failure: Play, message: str
) -> None:
    server = serve(failure)

    with pytest.raises(UserError, match=message):
        complete(endpoint(server.url), MESSAGES)

    assert len(server.asked) == 1 and not waits


@pytest.mark.parametrize("slow", [hangs, drips])
def test_a_slow_answer_is_given_up(serve: Callable[..., Server], waits: list[float], slow: Play) -> None:
    server = serve(slow)

    with pytest.raises(UserError, match=r"did not answer within 0.1 s; allow more"):
        complete(endpoint(server.url, timeout_s=0.1), MESSAGES)

    assert len(server.asked) <= 1 and not waits  # on a busy machine the client may leave before it is heard


def test_a_huge_answer_is_not_read_to_its_end(serve: Callable[..., Server]) -> None:
    server = serve(floods)

    with pytest.raises(UserError, match="answered over 1048576 bytes"):
        complete(endpoint(server.url), MESSAGES)

    assert len(server.asked) == 1
    assert server.sent < FLOOD


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(serve: Callable[..., Server], status: int) -> None:
    other = serve(says("text"))
    server = serve(answers(status, Location=f"{other.url}/elsewhere"))

    with pytest.raises(UserError, match=f"redirects to '{other.url}/elsewhere', which is not followed"):
        complete(endpoint(server.url), MESSAGES)

    assert len(server.asked) == 1 and not other.asked


# The key.


@pytest.mark.parametrize("play", [*map(echoes, (200, 302, 401, 403, 404, 429, 500)), babbles, hangs_up])
def test_no_error_shows_the_key(serve: Callable[..., Server], waits: list[float], play: Play) -> None:
    server = serve(play)

    with pytest.raises(UserError) as raised:
        complete(endpoint(server.url), MESSAGES)

    assert server.asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in "".join(traceback.format_exception(raised.value))


def test_no_repr_shows_the_key() -> None:
    assert repr(endpoint("http://host/v1")) == (
        "Endpoint(url='http://host/v1', model='m-7b', timeout_s=5.0, retries=2)"
    )


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f"Bearer {KEY}", f"{KEY}\u2022"])
def test_a_key_that_no_header_takes_is_refused_unseen(key: str) -> None:
    with pytest.raises(UserError, match="TUBELET_CHAT_KEY") as raised:
        endpoint("http://host/v1", key=key)

    assert KEY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("url", [f"https://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/v1#{KEY}"])
def test_a_url_that_may_hold_a_secret_is_refused_unseen(url: str) -> None:
    with pytest.raises(UserError, match="holds a user name, a query or a fragment") as raised:
        endpoint(url)

    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ""}, "looks like https://host/v1, is ''"),
        ({"url": "localhost:8000/v1"}, "is 'localhost:8000/v1'"),
        ({"url": "file:///v1"}, "is 'file:///v1'"),
        ({"url": "http://"}, "is 'http://'"),
        ({"url": "http:///v1"}, "is 'http:///v1'"),
        ({"url": "http://host:port/v1"}, "is 'http://host:port/v1'"),
        ({"url": "http://[::1/v1"}, "is 'http://"),
        ({"url": "http://ho st/v1"}, "is 'http://ho st/v1'"),
        ({"model": " "}, "model's name is empty"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0 and finite, is 0.0"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0 and finite, is inf"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0 and finite, is nan"),
        ({"retries": -1}, "retries must be 0 to 10, are -1"),
        ({"retries": 11}, "retries must be 0 to 10, are 11"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        endpoint(**({"url": "http://host/v1"} | changes))


# Tidying.


@pytest.mark.parametrize(
    "answer",
    [
        "A red ball.",
        '  "A red ball."\n',
        "Prompt: A red ball.",
        'Enhanced prompt: "A red ball."',
        '"Prompt: A red ball."',
        "**Prompt:** A red ball.",
        "Here's the expanded text-to-video prompt:\n\n\u201cA red ball.\u201d",
        "<think>The user wants\n\na ball.</think>\n\nA red\nball.",
        "`A red ball.`",
    ],
)
def test_an_answer_is_tidied_to_its_paragraph(answer: str) -> None:
    assert tidy(answer) == "A red ball."


@pytest.mark.parametrize(
    "answer",
    [
        'A sign says "open".',
        '"Open" says a sign, "closed" another: "so"',
        "A stage: two dancers wait for the prompt: a bell.",
        "A prompter whispers.",
        "\u4e00\u4e2a\u7ea2\u7403\u3002",
    ],
)
def test_quotes_and_words_inside_stay(answer: str) -> None:
    assert tidy(answer) == answer


@pytest.mark.parametrize(("sentence", "joint"), [("A red ball rolls.", " "), ("\u4e00\u4e2a\u7ea2\u7403\u3002", "")])
def test_a_long_answer_ends_with_a_whole_sentence(sentence: str, joint: str) -> None:
    text = tidy(joint.join([sentence] * 500))

    assert chat.MAX_TIDY - len(sentence) - 1 <= len(text) <= chat.MAX_TIDY
    assert text == joint.join([sentence] * text.count(sentence))


def test_a_long_sentence_ends_with_a_whole_word() -> None:
    assert tidy("tiny " * 1000) == ("tiny " * 400).rstrip()[: chat.MAX_TIDY]


@pytest.mark.parametrize("answer", ["", " \n", '""', "Prompt:", "<think>a ball</think>"])
def test_an_answer_without_a_paragraph_is_refused(answer: str) -> None:
    with pytest.raises(UserError, match="answered no paragraph"):
        tidy(answer)


# Showing frames.


def picture(time: float, height: int, width: int) -> np.ndarray:
    """Smooth, the same at every size, and another at every time in 0..1: uint8 [H,W,3]."""
    y, x = (np.arange(height) + 0.5)[:, None] / height, (np.arange(width) + 0.5)[None] / width
    return np.stack(np.broadcast_arrays(255 * x, 255 * y, 255.0 * time), axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((1, 48, 64), (48, 64)),
        ((3, 33, 17), (33, 17)),
        ((81, 48, 48), (48, 48)),
        ((5, 600, 1024), (300, 512)),
        ((2, 1024, 512), (512, 256)),
    ],
)
def test_the_pictures_of_a_message_are_the_clips_frames(shape: tuple[int, int, int], shown: tuple[int, int]) -> None:
    times = np.linspace(0, 1, shape[0])
    system, user = caption_messages(np.stack([picture(time, *shape[1:]) for time in times]))

    assert (system["role"], user["role"]) == ("system", "user") and "caption" in system["content"]
    chosen = times[shown_frames(shape[0], 4)]
    assert len(user["content"]) == len(chosen) == min(4, shape[0])
    for part, time in zip(user["content"], chosen, strict=True):
        assert part["type"] == "image_url"
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))), np.float64)
        assert decoded.shape == (*shown, 3)
        error = np.abs(decoded - picture(time, *shown))
        assert error.mean() < 3 and error.max() < 24, (error.mean(), error.max())


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_anything_but_a_clip_of_bytes_is_refused(frames: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"frames to show must be uint8 \[T,H,W,3\], are"):
        image_parts(frames)
