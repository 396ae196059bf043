"""Frames to video files and back, by PyAV.

Flows in: chunks of frames, uint8 RGB [T,H,W,3], and a path. Flows out: one file, whole or not at all.
Knows nothing of latents or models. The same frames make the same bytes: encoders run a fixed number of threads, and no
file carries a date, a path or a version of FFmpeg. (Another version of an encoder may still make other bytes.)

| suffix | content |
|---|---|
| .mp4 | H.264, yuv420p, BT.709 limited range, index before data; odd sizes grow by repeating the last row or column |
| .webp | animated, lossless |
| .gif | animated, a palette of 256 colours for each frame, times rounded to 1/100 s |
| .png | exactly one frame |
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from .atomic import temporary_beside
from .comment import add as add_comment
from .comment import check as check_comment
from .errors import UserError

Frames = NDArray[np.uint8]

BT709 = 1  # AVCOL_SPC_BT709, the matrix; PyAV names only swscale's constants
MAX_SIZE = 16383  # pixels, the least of the formats' own limits: WebP's
THREADS = 4  # fixed, because x264's output depends on it
RESAMPLE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.BITEXACT


def _as_is(rgb: Frames) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(rgb, format="rgb24")


def _bt709(rgb: Frames) -> av.VideoFrame:
    """RGB [H,W,3] to BT.709 limited-range yuv420p; swscale left alone would use BT.601."""
    frame = _as_is(rgb).reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=RESAMPLE,
        threads=1,
    )
    frame.color_primaries, frame.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return frame


def _paletted(rgb: Frames) -> av.VideoFrame:
    """RGB [H,W,3] to 256 colours chosen for this frame, dithered."""
    height, width, _ = rgb.shape
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=_as_is(rgb).format, time_base=Fraction(1))
    split, sink = graph.add("split"), graph.add("buffersink")
    palette, mapped = graph.add("palettegen", "reserve_transparent=0"), graph.add("paletteuse")
    source.link_to(split)
    split.link_to(mapped, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(mapped, 0, 1)
    mapped.link_to(sink)
    graph.configure()
    graph.push(_as_is(rgb))
    graph.push(None)
    return graph.vpull()


@dataclass(frozen=True)
class Codec:
    """How one suffix is written."""

    container: str
    encoder: str
    pixels: str
    convert: Callable[[Frames], av.VideoFrame] = _as_is  # [H,W,3] -> a frame to encode
    options: dict[str, str] = field(default_factory=dict)  # the encoder's
    container_options: dict[str, str] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)  # colour attributes of the stream
    multiple: int = 1  # of pixels, in both directions
    min_fps: Fraction = Fraction(1, 1000)
    max_fps: int = 1000
    max_frames: float = float("inf")


CODECS = MappingProxyType(
    {
        ".mp4": Codec(
            container="mp4",
            encoder="libx264",
            pixels="yuv420p",
            convert=_bt709,
            multiple=2,
            options={"crf": "14", "preset": "medium"},
            container_options={"movflags": "+faststart"},
            tags={
                "colorspace": BT709,
                "color_primaries": ColorPrimaries.BT709,
                "color_trc": ColorTrc.BT709,
                "color_range": ColorRange.MPEG,
            },
        ),
        ".webp": Codec(
            container="webp",
            encoder="libwebp_anim",
            pixels="bgra",
            options={"lossless": "1"},
            container_options={"loop": "0"},
        ),
        ".gif": Codec(
            container="gif",
            encoder="gif",
            pixels="pal8",
            convert=_paletted,
            min_fps=Fraction(1, 655),  # a frame lasts up to 65535/100 s
            max_fps=50,
        ),
        ".png": Codec(container="image2pipe", encoder="png", pixels="rgb24", max_frames=1),
    }
)


class VideoWriter:
    """Writes frames to a video file as they come; memory does not grow with duration (.webp: with the file's size).

    The file appears under its name when `close` succeeds, replacing an older one. Until then it is a temporary file in
    the same folder, which is removed if the `with` block raises, or if the writer is dropped without `close`.

        with VideoWriter(Path("clip.mp4"), width=48, height=48, fps=16) as video:
            for chunk in chunks:  # uint8 [T,48,48,3]
                video.write(chunk)
    """

    def __init__(
        self, path: str | os.PathLike[str], width: int, height: int, fps: float | Fraction, comment: str = ""
    ) -> None:
        """`width`, `height` in pixels, `fps` in frames a second; `comment` is what `comment.get` finds in the file.

        Raises UserError for a suffix that is not in CODECS, a size, rate or comment that the format does not allow, a
        path that is a folder, or a folder that cannot be written to.
        """
        self.path = Path(path)
        self.shape = (height, width, 3)
        self.frames = 0
        self._codec, self._comment = codec_for(self.path), comment
        slowest, fastest = self._codec.min_fps, self._codec.max_fps
        if not 1 <= min(width, height) <= max(width, height) <= MAX_SIZE:
            raise UserError(f"width and height must be 1 to {MAX_SIZE} pixels, are {width} and {height}")
        if not slowest <= fps <= fastest:  # neither is NaN
            raise UserError(f"{self.path.suffix} holds {slowest} to {fastest} frames a second, fps is {fps}")
        check_comment(comment)
        rate = Fraction(fps).limit_denominator(1001)  # FFmpeg holds rates as 32-bit fractions
        self._tick = 1 / rate
        self._temporary = temporary_beside(self.path)
        self._container, self._stream = _prepare(self._temporary, self._codec, width, height, rate)
        if comment:
            self._container.metadata["comment"] = comment  # of these formats only .mp4 keeps it
        self._discard = weakref.finalize(self, _abandon, self._container, self._temporary)
        with self._writing():
            _refuse_folder(self.path)
            self._container.start_encoding()

    def write(self, frames: Frames) -> None:
        """Appends uint8 RGB frames [T,H,W,3]; T may differ between calls.

        Raises UserError for another dtype or shape, for more frames than the format holds, or after `close`; also for a
        full disk, which discards the file.
        """
        if not self._discard.alive:
            raise UserError(f"the writer of {self.path} is closed; open another")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self.shape:
            height, width, _ = self.shape
            raise UserError(
                f"frames must be uint8 [T,{height},{width},3], are {frames.dtype} {list(frames.shape)}; "
                f"open the writer with their size and convert them to uint8"
            )
        check_length(self.path, self.frames + len(frames))
        height, width = (-size % self._codec.multiple for size in self.shape[:2])
        if height or width:
            frames = np.pad(frames, ((0, 0), (0, height), (0, width), (0, 0)), mode="edge")
        for rgb in frames:
            frame = self._codec.convert(rgb)
            frame.pts, frame.time_base = self.frames, self._tick
            with self._writing():
                self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. Does nothing the second time.

        Raises UserError if no frame was written or the disk is full. Whatever it raises, nothing new is left behind.
        """
        if not self._discard.alive:
            return
        with self._writing():
            if not self.frames:
                raise UserError(f"no frames were written to {self.path}; write at least one before closing")
            self._container.mux(self._stream.encode(None))
            self._container.close()
            if self._comment:
                add_comment(self._temporary, self.path.suffix.lower(), self._comment)
            os.replace(self._temporary, self.path)
        self._discard.detach()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Discards the file when anything fails inside; what the system refuses becomes a UserError."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self._discard()
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free space or choose another path in a writable folder"
            ) from error
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def read_frames(path: str | os.PathLike[str]) -> tuple[Frames, Fraction]:
    """Decodes a whole file: uint8 RGB [T,H,W,3] and its frames a second.

    Colours follow the file's tags. Raises UserError for a file that is missing or that FFmpeg cannot decode, animated
    .webp among them.
    """
    try:
        with av.open(os.path.abspath(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24", interpolation=RESAMPLE) for frame in container.decode(stream)]
            return np.stack(frames).astype(np.uint8, copy=False), Fraction(stream.average_rate or 1)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"cannot read video frames from {path}: {error}") from error


def codec_for(path: Path) -> Codec:
    """The row of CODECS for a path's suffix. Raises UserError for any other suffix."""
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        raise UserError(f"cannot write {path}: suffix {path.suffix!r} is not one of {', '.join(CODECS)}")
    return codec


def check_length(path: Path, frames: int) -> None:
    """Raises UserError when the path's format does not hold that many frames."""
    codec = codec_for(path)
    if frames > codec.max_frames:
        raise UserError(
            f"{path.suffix} holds {codec.max_frames} frame, the clip has {frames}; "
            f"write {', '.join(suffix for suffix, codec in CODECS.items() if codec.max_frames > 1)} instead"
        )


def _prepare(path: Path, codec: Codec, width: int, height: int, fps: Fraction) -> tuple[OutputContainer, VideoStream]:
    """A container with its one stream, which creates no file yet."""
    options = {"fflags": "+bitexact", **codec.container_options}
    container = av.open(os.path.abspath(path), "w", format=codec.container, container_options=options)
    stream = container.add_stream(codec.encoder, rate=fps, options={"flags": "+bitexact", **codec.options})
    assert isinstance(stream, VideoStream)
    stream.width, stream.height = (size + -size % codec.multiple for size in (width, height))
    stream.pix_fmt = codec.pixels
    stream.codec_context.thread_count = THREADS
    for name, value in codec.tags.items():
        setattr(stream.codec_context, name, value)
    return container, stream


def _refuse_folder(path: Path) -> None:
    """Raises UserError for a folder, and OSError for what cannot be a file's name."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.stat().st_mode):
            raise UserError(f"cannot write {path}: it is a folder; give a file name inside it")


def _abandon(container: OutputContainer, temporary: Path) -> None:
    with contextlib.suppress(av.FFmpegError, OSError):
        container.close()
    with contextlib.suppress(OSError):
        temporary.unlink()
