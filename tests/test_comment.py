"""Proves that a comment is in the file, that nothing else changed, and that finding it costs little.

Run: pytest tests/test_comment.py
"""

from __future__ import annotations

import struct
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tubelet.runtime import comment
from tubelet.runtime.errors import UserError
from tubelet.runtime.video import CODECS, VideoWriter

suffixes = pytest.mark.parametrize("suffix", list(CODECS))
TEXTS = ["a", '{\n\t"prompt": "a <b> & \'c\' ]]> 猫 🎥 ü"\n}', 300 * "é", 100_000 * "long ", " spaces "]


def write(path: Path, text: str = "", frames: int = 3) -> Path:
    """Noise of 32x48 pixels."""
    frames = 1 if CODECS[path.suffix].max_frames == 1 else frames
    with VideoWriter(path, 48, 32, 16, comment=text) as video:
        video.write(np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), np.uint8))
    return path


def pictures(path: Path) -> list[bytes]:
    """As PyAV decodes an .mp4, and Pillow the others, each with its duration."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [str(f.pts).encode() + f.to_ndarray().tobytes() for f in container.decode(video=0)]
    with Image.open(path) as image:
        frames = ImageSequence.Iterator(image)
        return [str(f.info.get("duration")).encode() + f.convert("RGBA").tobytes() for f in frames]


@suffixes
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_comment_comes_back_and_the_pictures_stay(tmp_path: Path, suffix: str, text: str, frames: int) -> None:
    plain = write(tmp_path / f"plain{suffix}", frames=frames)
    path = write(tmp_path / f"a{suffix}", text, frames)

    assert comment.get(path) == text and comment.get(plain) is None
    assert pictures(path) == pictures(plain)
    assert len(list(tmp_path.iterdir())) == 2


@suffixes
def test_the_same_comment_makes_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = write(tmp_path / f"a{suffix}", TEXTS[1]), write(tmp_path / f"b{suffix}", TEXTS[1])

    assert first.read_bytes() == second.read_bytes()
    assert b"Lav" not in first.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_a_file_without_a_comment_has_the_bytes_of_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path, encoded = write(tmp_path / f"a{suffix}"), []
    monkeypatch.setattr("tubelet.runtime.video.add_comment", lambda path, *_: encoded.append(path.read_bytes()))

    write(tmp_path / f"b{suffix}", "text")

    assert encoded == [path.read_bytes()]


def test_other_programs_find_it_where_the_standards_put_it(tmp_path: Path) -> None:
    text = TEXTS[1]

    with Image.open(write(tmp_path / "a.png", text)) as image:
        assert image.info["Comment"] == text
    with Image.open(write(tmp_path / "a.gif", text)) as image:
        assert image.info["comment"].decode() == text and image.info["loop"] == 0
    with Image.open(write(tmp_path / "a.webp", text)) as image:
        found = ElementTree.fromstring(image.info["xmp"]).iterfind(".//{http://purl.org/dc/elements/1.1/}description")
        assert ["".join(node.itertext()) for node in found] == [text]
    with av.open(str(write(tmp_path / "a.mp4", text))) as container:
        assert container.metadata["comment"] == text


@pytest.mark.parametrize("frames", [1, 3])
def test_the_chunks_of_a_webp_add_up(tmp_path: Path, frames: int) -> None:
    data = write(tmp_path / "a.webp", "odd", frames).read_bytes()

    names, at = [], 12
    while at < len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        names.append(name)
        at += 8 + length + length % 2
    assert at == len(data) == struct.unpack_from("<I", data, 4)[0] + 8
    assert names == [b"VP8X", *([b"VP8L"] if frames == 1 else [b"ANIM", b"ANMF", b"ANMF", b"ANMF"]), b"XMP "]
    assert data[20] == (0x04 if frames == 1 else 0x06)  # XMP; animation
    assert [1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27)] == [48, 32]


def test_a_large_file_is_moved_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comment, "CHUNK", 7)
    plain, path = write(tmp_path / "plain.gif"), write(tmp_path / "a.gif", "text")

    assert comment.get(path) == "text" and pictures(path) == pictures(plain)


@suffixes
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_the_comment_is_added_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, error: BaseException
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"older")

    def fail(temporary: Path, *_: object) -> None:
        temporary.write_bytes(b"half")
        raise error

    monkeypatch.setattr("tubelet.runtime.video.add_comment", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write(path, "text")

    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"


@suffixes
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\0b", r"cannot hold '\\x00', at character 1"),
        ("\x1b[0m", r"cannot hold '\\x1b', at character 0"),
        ("a\r\n", r"cannot hold '\\r', at character 1"),
        ("\udcff", r"cannot hold '\\udcff', at character 0"),
        ("é" * 600_000, "holds 1048576 bytes of UTF-8, this has 1200000; shorten it"),
    ],
)
def test_a_comment_that_some_format_cannot_hold_is_refused_at_once(
    tmp_path: Path, suffix: str, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / f"a{suffix}", 48, 32, 16, comment=text)

    assert list(tmp_path.iterdir()) == []


@suffixes
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", 5 * TEXTS[1])
    whole, message = path.read_bytes(), rf"cannot read a comment from .*a\{suffix}: .*; give a .* that is whole"

    for content in (b"", b"no picture at all", whole[:60], whole[:300], whole[: whole.index(b"prompt")]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            comment.get(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(UserError, match="there is no file"):
            comment.get(path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_a_comment_in_another_encoding_is_read_as_far_as_it_goes(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", "from a cafe")
    path.write_bytes(path.read_bytes().replace(b"a cafe", "a café".encode("latin-1")))

    assert comment.get(path) == "from a caf\ufffd"


def test_another_programs_xmp_is_no_comment(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")

    assert comment.get(tmp_path / "a.webp") is None


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_a_file_of_gigabytes_is_not_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", "text")
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # a hole on the disk

    with pytest.raises(UserError, match="has 3221225472 bytes, over 536870912; its comment is not looked for"):
        comment.get(path)
