"""Videos and images that a caller brings, to the frames that a model works on.

Flows in: the path of a file of any origin. Flows out: uint8 RGB [T,H,W,3] at a model's rate and size, upright, laid on
black where it is transparent. Knows nothing of models. Opens nothing but that file: FFmpeg gets its bytes without its
name, and no protocol to open another one with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import BinaryIO, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from .errors import UserError
from .fit import Fit, Size, fitted, shown_size
from .orientation import matrix_of
from .video import Frames

T = TypeVar("T")

FORMATS = (  # FFmpeg's names; all of them hold their own pictures
    "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,mxf,nut,ivf,yuv4mpegpipe,gif,apng,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,pbm_pipe,pgm_pipe,ppm_pipe,pam_pipe"
)
SLACK = 0.5  # seconds that a whole file may lack of what it says it lasts


@dataclass(frozen=True)
class Limits:
    """What a file may hold at most; one that holds more is refused, not cut."""

    bytes: int = 4 << 30
    pixels: int = 8192 * 8192  # of a frame, as stored or on its way to the wanted size
    frames: int = 20_000
    seconds: int = 120


def read_clip(
    path: str | os.PathLike[str],
    fps: Fraction | float,
    size: Callable[[Size], Size],
    fit: Fit = Fit.CROP,
    limits: Limits = Limits(),
) -> Frames:
    """Reads a video, or an image as a clip of one frame: uint8 RGB [T,H,W,3].

    `size` is asked once for the (width, height) of the result, given those of the file as it is shown. Frame k of the
    result is what is shown at (k + 1/2) / fps seconds. Raises UserError when the file is missing, cut short, damaged,
    no media, or over a limit. What a transport stream lacks at its end cannot be known.
    """
    name, fps = os.fspath(path), Fraction(fps)
    clip: list[Frames] = []
    wanted = None
    with _opened(name, limits) as container:
        stream = _best_stream(container, name, limits)
        for frame, times in resample(_timed(_decoded(container, stream, name), stream, name, limits), fps):
            if len(clip) + times > limits.seconds * fps:
                raise UserError(f"{name} lasts over {limits.seconds} seconds, the limit; cut it first")
            matrix = matrix_of(frame, name)
            shown = shown_size(frame, matrix, Fraction(stream.sample_aspect_ratio or 1))
            wanted = wanted or size(shown)
            clip += [fitted(frame, matrix, shown, wanted, fit, limits.pixels)] * times
    return np.stack(clip)


def resample(timed: Iterable[tuple[Fraction, Fraction, T]], fps: Fraction) -> Iterator[tuple[T, int]]:
    """Which pictures are shown in the middles of the intervals of 1 / fps seconds, and in how many of them each.

    timed: one or more (start, end, picture), in seconds after the first one's start. A picture is shown until the next
    one starts, the last until its end; one that is alone is shown once. Yields no picture that is never shown.
    """
    pictures = iter(timed)
    _, end, shown = next(pictures)
    passed, alone = 0, True
    for start, next_end, picture in pictures:
        before = _middles_before(start, fps)
        if before > passed:
            yield shown, before - passed
            passed = before
        end, shown, alone = next_end, picture, False
    rest = 1 if alone else _middles_before(end, fps) - passed
    if rest > 0 or not passed:
        yield shown, max(rest, 1)


def _middles_before(time: Fraction, fps: Fraction) -> int:
    return ceil(time * fps - Fraction(1, 2))


@contextmanager
def _opened(name: str, limits: Limits) -> Iterator[InputContainer]:
    """The file as a container; what FFmpeg or the system refuses meanwhile becomes a UserError."""
    if not os.path.exists(name):
        raise UserError(f"there is no file {name}; give the path of a video or an image on this machine, not a URL")
    if not os.path.isfile(name):
        raise UserError(f"{name} is not a file; give the path of a video or an image")
    size = os.path.getsize(name)
    if not 0 < size <= limits.bytes:
        raise UserError(f"{name} has {size} bytes, a video or an image has 1 to {limits.bytes}; give another file")
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "max_pixels": str(limits.pixels)}
    try:
        with (
            open(os.open(name, os.O_RDONLY), "rb") as nameless,
            av.open(nameless, "r", _sniffed(nameless, name), options, metadata_errors="replace") as container,
        ):
            yield container
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"cannot read {name}: {error.strerror}; if it is whole, and a video or an image, convert it to .mp4 or .png"
        ) from error


def _sniffed(file: BinaryIO, name: str) -> str | None:
    """The format of a JPEG, which FFmpeg takes for a film if another follows in the file, as phones write them.

    Raises UserError for a GIF without its end, which FFmpeg does not miss.
    """
    start = file.read(4)
    file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
    end = file.read().rstrip(b"\0\r\n")
    file.seek(0)
    if start == b"GIF8" and not end.endswith(b";"):
        raise UserError(f"{name} is cut short; copy it again")
    return "jpeg_pipe" if start.startswith(b"\xff\xd8\xff") else None


def _best_stream(container: InputContainer, name: str, limits: Limits) -> VideoStream:
    """The stream to show, set up to decode within the limits."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.codec_context is None:
        raise UserError(f"{name} holds no video that can be decoded; convert it to .mp4 or .png")
    if any(Disposition.dependent in other.disposition for other in container.streams.video):
        raise UserError(f"{name} is stored in tiles, which are not put together here; convert it to .png")
    if container.duration is not None and container.duration > limits.seconds * av.time_base:
        raise UserError(f"{name} lasts over {limits.seconds} seconds, the limit; cut it first")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width:
        raise UserError(
            f"cannot read {name}: it is cut short, damaged, over {limits.pixels} pixels, or an animated .webp; "
            f"convert it to .mp4 or .png"
        )
    if width * height > limits.pixels:
        raise UserError(f"{name} has frames of {width}x{height}, over {limits.pixels} pixels, the limit; shrink it")
    strict = {"err_detect": "explode"} if container.format.name == "jpeg_pipe" else {}  # or a cut one is painted over
    stream.codec_context.options = {"max_pixels": str(limits.pixels), **strict}
    return stream


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Iterator[av.VideoFrame]:
    """Every frame of the stream. Raises UserError where one is damaged, and at the end where the file is cut short."""
    packets, end = 0, Fraction(0)  # of the stream; of all streams, for any of them may be the longest
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream is stream:
            frames = stream.decode(packet)
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise UserError(f"{name} is damaged or cut short after {packets} frames; copy it again")
            if frames and container.format.name.endswith("_pipe"):  # an image, whatever else is in the file
                yield frames[0]
                return
            yield from frames
            packets += packet.size > 0
    said = (container.duration or 0) / av.time_base
    if packets < len(stream.index_entries) or end + SLACK < said:
        raise UserError(f"{name} is cut short after {packets} frames and {float(end):.2f} seconds; copy it again")


def _timed(
    frames: Iterator[av.VideoFrame], stream: VideoStream, name: str, limits: Limits
) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """Adds to each frame when it starts and ends, in seconds after the first one's start."""
    tick, usual = Fraction(stream.time_base or 1), 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    first, end, number = None, Fraction(0), 0
    for number, frame in enumerate(frames, 1):
        if number > limits.frames:
            raise UserError(f"{name} has over {limits.frames} frames, the limit; cut it first")
        start = end
        if frame.pts is not None:
            first = frame.pts * tick - end if first is None else first
            start = frame.pts * tick - first
        end = start + (frame.duration * tick or usual)
        yield start, end, frame
    if not number:
        raise UserError(f"{name} holds no picture that can be decoded; convert it to .mp4 or .png")
