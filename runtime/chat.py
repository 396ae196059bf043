"""Asks a language model, by any endpoint that speaks the chat protocol of OpenAI.

Flows in: an endpoint and messages; frames, uint8 RGB [T,H,W,3], to show to one that sees. Flows out: the answer's text.
Knows nothing of prompts, and reads no environment variable: the command line passes the key. (Proxies and certificates
are the machine's, as httpx finds them.) No error or repr holds the key, and it goes to no host but the endpoint's.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import UserError
from .sheet import shown_frames
from .strict import require

if TYPE_CHECKING:
    import httpx

Message = Mapping[str, Any]

KEY_VARIABLE = "TUBELET_CHAT_KEY"  # read by the command line, named by our errors
MAX_BYTES = 2**20  # of an answer, thoughts of the model included
MAX_QUOTE = 200  # characters of the server's words in an error
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0  # before another try: doubled each time; the most that Retry-After can ask
REMEDIES = {
    400: "check the model's name; to caption pictures, name a model that sees",
    401: f"set {KEY_VARIABLE} to a key that it accepts",
    403: f"give {KEY_VARIABLE} a key that may use this model",
    404: "mend the url (without /chat/completions) or the model's name",
    408: "try again later",
    413: "choose an endpoint that takes longer messages",
    429: "try again later, or raise your limit of requests there",
}
MAX_TIDY = 2000  # characters, about the 512 tokens that most video models read
LABEL = re.compile(r"^[*_#\s]*(?:[-\w'\u2019 ]{0,40}\b)?prompt[*_\s]*[:\uff1a][*_\s]*", re.IGNORECASE)
QUOTES = (('"', '"'), ("\u201c", "\u201d"), ("\u00ab", "\u00bb"), ("\u300c", "\u300d"), ("`", "`"))
SENTENCE_END = re.compile(r"[.!?](?= )|[\u3002\uff01\uff1f]")  # the latter: Chinese and Japanese

CAPTION_FRAMES, CAPTION_SIDE = 4, 512  # pictures of a clip, pixels of the longer side
CAPTION = """You write captions for training a text-to-video model. The pictures are frames of one clip, in order.
Write one paragraph of 40 to 80 words in English, in the present tense: the subject and how it looks, what it does and
how that changes from picture to picture, the setting, the camera (shot, angle, movement), the light and the style.
Say only what can be seen; guess no names, sounds, feelings or intentions. Speak of the scene, not of its pictures.
Answer with the paragraph alone, without a title or quotation marks."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. Raises UserError for a value that cannot work; its messages never hold the key."""

    url: str  # what /chat/completions is appended to, such as http://localhost:8000/v1
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0  # of silence, and of the answer's whole body, after which a try is given up
    retries: int = 3  # further tries after a failure that may pass

    def __post_init__(self) -> None:
        require(
            not re.search("[@?#]", self.url),  # may be a secret, so the message does not repeat it
            f"the chat url holds a user name, a query or a fragment; leave it out and set {KEY_VARIABLE} to the key",
        )
        require(
            re.fullmatch(r"https?://[!-~]+", self.url) is not None and _has_host(self.url),
            f"a chat url looks like https://host/v1, is {self.url!r}",
        )
        require(bool(self.model.strip()), "the chat model's name is empty; name one that the endpoint serves")
        require(
            self.key is None or re.fullmatch("[!-~]*", self.key) is not None,
            f"the key holds a space, a line break or another character that no header takes; set {KEY_VARIABLE} again",
        )
        require(0 < self.timeout_s < float("inf"), f"timeout_s must be above 0 and finite, is {self.timeout_s}")
        require(0 <= self.retries <= 10, f"retries must be 0 to 10, are {self.retries}")

    @property
    def target(self) -> str:
        """The URL that is asked."""
        return f"{self.url.rstrip('/')}/chat/completions"


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        return False


class _Transient(UserError):
    """Another try may do better, once `wait` seconds have passed."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


def complete(endpoint: Endpoint, messages: Sequence[Message]) -> str:
    """The text that the model answers to the messages.

    Tries again, later each time, when the endpoint cannot be reached or answers 408, 429 or 5xx. Raises UserError when
    no try succeeds, for a timeout or any other status (redirects are not followed), for an answer that is not a chat
    completion, holds no text or is over MAX_BYTES, and when httpx is not installed.
    """
    try:
        body = json.dumps({"model": endpoint.model, "messages": list(messages)}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a message holds {error.object[error.start]!r}, which is no text; pass UTF-8") from error
    with _client(endpoint) as client:
        for attempt in range(endpoint.retries):
            try:
                return _text(endpoint, _post(client, endpoint, body))
            except _Transient as failure:
                sleep(max(failure.wait, FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1)))
        return _text(endpoint, _post(client, endpoint, body))


def _client(endpoint: Endpoint) -> httpx.Client:
    try:
        import httpx

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # bytes read are bytes sent
        if endpoint.key:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        return httpx.Client(headers=headers, timeout=endpoint.timeout_s, follow_redirects=False)
    except ImportError as error:  # of httpx, or of what it needs for a SOCKS proxy
        raise UserError(f"a chat endpoint needs a package that is missing ({error}); install tubelet[chat]") from error


def _post(client: httpx.Client, endpoint: Endpoint, body: bytes) -> bytes:
    """One try. Returns the body of a success, raises _Transient where another try may do better, else UserError."""
    import httpx

    try:
        with client.stream("POST", endpoint.target, content=body) as response:
            data = _read(response, monotonic() + endpoint.timeout_s)
    except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
        words = _quote(endpoint, str(error))
        # From None here and below: what the server sent may hold the key, and the libraries' errors quote it.
        raise _Transient(f"cannot reach {endpoint.target} ({words}); start its server or mend the url") from None
    except httpx.TimeoutException:
        limit = f"{endpoint.timeout_s:g} s"
        raise UserError(f"{endpoint.target} did not answer within {limit}; allow more or use a faster model") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"cannot ask {endpoint.target} ({_quote(endpoint, str(error))}); mend the url") from None
    if not response.is_success:
        raise _refusal(endpoint, response, data)
    require(len(data) <= MAX_BYTES, f"{endpoint.target} answered over {MAX_BYTES} bytes; choose another model")
    return data


def _read(response: httpx.Response, deadline: float) -> bytes:
    """The body, or its beginning if it is over MAX_BYTES. Raises httpx.ReadTimeout past the deadline."""
    import httpx

    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MAX_BYTES:
            break
        if monotonic() > deadline:
            raise httpx.ReadTimeout("the body comes too slowly")
    return bytes(data)


def _refusal(endpoint: Endpoint, response: httpx.Response, data: bytes) -> UserError:
    """The error for any status but a success."""
    status = response.status_code
    if response.has_redirect_location:
        place = _quote(endpoint, response.headers["Location"])
        return UserError(f"{endpoint.target} redirects to {place}, which is not followed; give the url that answers")
    at_fault = "its server is at fault, try again later" if status >= 500 else "see its words"
    words = _quote(endpoint, data.decode("utf-8", "replace"))
    message = (
        f"{endpoint.target} answered {status} for model {endpoint.model!r} ({words}); {REMEDIES.get(status, at_fault)}"
    )
    if status in (408, 429) or status >= 500:
        return _Transient(message, _asked_wait(response.headers.get("Retry-After", "")))
    return UserError(message)


def _asked_wait(value: str) -> float:
    """The seconds of a Retry-After header, given as a number or a date, up to MAX_WAIT_S; 0 for anything else."""
    try:
        if value.isdecimal():
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError, TypeError):  # TypeError: a date without a time zone
        return 0.0
    return min(max(seconds, 0.0), MAX_WAIT_S)


def _text(endpoint: Endpoint, data: bytes) -> str:
    """choices[0].message.content of a chat completion."""
    words = _quote(endpoint, data.decode("utf-8", "replace"))
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{endpoint.target} answered no JSON ({words}); mend the url") from None
    try:
        content = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise UserError(f"{endpoint.target} answered without choices[0].message.content ({words}); mend the url")
    require(bool(content.strip()), f"{endpoint.target} answered an empty text; ask again or choose another model")
    return content.encode("utf-8", "ignore").decode()  # JSON can hold halves of surrogate pairs


def _quote(endpoint: Endpoint, words: str) -> str:
    """The server's words, short, printable and without the key."""
    hidden = words.replace(endpoint.key, "***") if endpoint.key else words
    return repr(" ".join(hidden.split())[:MAX_QUOTE])


def tidy(answer: str) -> str:
    """One paragraph from what a language model answered: no thoughts, label, quotation marks or line breaks around it.

    One over MAX_TIDY characters ends with its last whole sentence. Raises UserError if nothing is left.
    """
    text = " ".join(re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).split())
    before = None
    while text != before:
        before = text
        for opening, closing in QUOTES:
            if text.startswith(opening) and text.find(closing, 1) == len(text) - 1:
                text = text[1:-1].strip()
        text = LABEL.sub("", text)
    require(bool(text), f"the language model answered no paragraph but {answer[:60]!r}; ask again or choose another")
    if len(text) <= MAX_TIDY:
        return text
    ends = [match.end() for match in SENTENCE_END.finditer(text[:MAX_TIDY])]
    return text[: ends[-1]] if ends else text[:MAX_TIDY].rsplit(" ", 1)[0]


def image_parts(frames: NDArray[np.uint8]) -> list[Message]:
    """CAPTION_FRAMES frames of a clip, evenly spaced, as parts of a message: JPEG, up to CAPTION_SIDE pixels a side.

    frames: uint8 RGB [T,H,W,3]. Raises UserError for another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise UserError(f"frames to show must be uint8 [T,H,W,3], are {frames.dtype} {list(frames.shape)}")
    return [
        {"type": "image_url", "image_url": {"url": _data_url(frames[number])}}
        for number in shown_frames(len(frames), CAPTION_FRAMES)
    ]


def _data_url(frame: NDArray[np.uint8]) -> str:
    """[H,W,3] -> a JPEG inside a URL."""
    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((CAPTION_SIDE, CAPTION_SIDE))
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def caption_messages(frames: NDArray[np.uint8]) -> list[Message]:
    """Messages that ask a model that sees for the caption of a clip, uint8 RGB [T,H,W,3]. `tidy` what it answers."""
    return [{"role": "system", "content": CAPTION}, {"role": "user", "content": image_parts(frames)}]
