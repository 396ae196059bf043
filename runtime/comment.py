"""Text in the comment field of a video or an image, where other programs show it too.

Flows in: a finished file and a text. Flows out: the same file with the text in it; and from a file, its text. The same
text makes the same bytes, and pictures stay as they are: the text is one block among those that a file consists of.

| suffix | block |
|---|---|
| .mp4 | `comment` of the metadata, which FFmpeg writes |
| .png | iTXt chunk "Comment" after the header (PNG 3rd edition, 11.3.3.4) |
| .gif | comment extension before the first frame (GIF89a, 24), in UTF-8 where the standard says ASCII |
| .webp | XMP chunk at the end (RFC 9649, 2.7.1.4), with the text as its dc:description |
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from xml.sax.saxutils import escape, unescape

import av
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .errors import UserError

MAX_TEXT = 1 << 20  # bytes of UTF-8
MAX_FILE = 1 << 29  # bytes of a .png, .gif or .webp, of which Pillow may read all
CHUNK = 1 << 20  # bytes moved at a time
UNFIT = re.compile("[\0-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # what XML or UTF-8 cannot hold
KINDS = ".mp4, .png, .gif or .webp"
XMP_START = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">'
)
XMP_END = "</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"


def check(text: str) -> None:
    """Raises UserError for a text that not every format can hold."""
    if found := UNFIT.search(text):
        raise UserError(f"a comment cannot hold {found[0]!r}, at character {found.start()}; take it out")
    if len(text.encode()) > MAX_TEXT:
        raise UserError(f"a comment holds {MAX_TEXT} bytes of UTF-8, this has {len(text.encode())}; shorten it")


def add(path: Path, suffix: str, text: str) -> None:
    """Puts a text that `check` accepts into a file that VideoWriter has finished; a .mp4 has it already."""
    if suffix in WRITERS:
        WRITERS[suffix](path, text)


def get(path: Path) -> str | None:
    """The comment of a file, None where there is none.

    Raises UserError for a file that is missing, damaged, or too large to look through.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a {KINDS}")
    reader = READERS.get(path.suffix.lower(), _read_mp4)
    if reader is not _read_mp4 and path.stat().st_size > MAX_FILE:
        raise UserError(f"{path} has {path.stat().st_size} bytes, over {MAX_FILE}; its comment is not looked for")
    try:
        return reader(path)
    except (av.FFmpegError, OSError, SyntaxError, ValueError, IndexError) as error:  # SyntaxError is Pillow's
        raise UserError(
            f"cannot read a comment from {path}: {error}; give a {KINDS} that is whole and has its own suffix"
        ) from error


def _write_png(path: Path, text: str) -> None:
    chunk = b"iTXtComment" + bytes(5) + text.encode()  # keyword; not compressed; no language, no translated keyword
    header = 8 + 25  # signature, IHDR
    _insert(path, header, struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))


def _write_gif(path: Path, text: str) -> None:
    with path.open("rb") as file:
        flags = file.read(13)[10]
    header = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # with the colours that all frames share
    data = text.encode()
    parts = (data[start : start + 255] for start in range(0, len(data), 255))
    _insert(path, header, b"!\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")


def _write_webp(path: Path, text: str) -> None:
    with path.open("rb") as file:
        start = file.read(30)
    if start[12:16] == b"VP8L":  # one frame in the simple format, which has no place for XMP
        size = int.from_bytes(start[21:25], "little")  # width - 1, height - 1 and alpha, of 14, 14 and 1 bits
        sides = (side.to_bytes(3, "little") for side in (size & 0x3FFF, size >> 14 & 0x3FFF))
        _insert(path, 12, b"VP8X" + struct.pack("<2I", 10, (size >> 28 & 1) << 4) + b"".join(sides))
    xmp = (XMP_START + escape(text) + XMP_END).encode()
    with path.open("r+b") as file:
        file.seek(20)
        flags = file.read(1)[0] | 0x04  # has XMP
        file.seek(20)
        file.write(bytes([flags]))
        file.seek(0, 2)
        file.write(b"XMP " + struct.pack("<I", len(xmp)) + xmp + bytes(len(xmp) % 2))
        length = file.tell() - 8
        file.seek(4)
        file.write(struct.pack("<I", length))


def _insert(path: Path, at: int, block: bytes) -> None:
    """Moves the rest of a file back to make room for a block."""
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        while end > at:
            start = max(at, end - CHUNK)
            file.seek(start)
            moved = file.read(end - start)
            file.seek(start + len(block))
            file.write(moved)
            end = start
        file.seek(at)
        file.write(block)


def _read_png(path: Path) -> str | None:
    with PngImageFile(path) as image:
        return image.info.get("Comment")


def _read_gif(path: Path) -> str | None:
    with GifImageFile(path) as image:
        text = image.info.get("comment")
    return None if text is None else text.decode(errors="replace")


def _read_webp(path: Path) -> str | None:
    with WebPImageFile(path) as image:
        xmp = image.info.get("xmp", b"").decode(errors="replace")
    if not (xmp.startswith(XMP_START) and xmp.endswith(XMP_END)):
        return None
    return unescape(xmp[len(XMP_START) : -len(XMP_END)])


def _read_mp4(path: Path) -> str | None:
    options = {"protocol_whitelist": "none"}
    with path.open("rb") as file, av.open(file, "r", "mp4", options, metadata_errors="replace") as container:
        if not next(container.demux(video=0)).size:
            raise ValueError("it ends before its first frame, and maybe before its comment")
        return container.metadata.get("comment")


WRITERS: MappingProxyType[str, Callable[[Path, str], None]] = MappingProxyType(
    {".png": _write_png, ".gif": _write_gif, ".webp": _write_webp}
)
READERS: MappingProxyType[str, Callable[[Path], str | None]] = MappingProxyType(
    {".png": _read_png, ".gif": _read_gif, ".webp": _read_webp}
)
