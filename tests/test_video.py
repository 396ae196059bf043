"""Proves what a written video file is: its colours, tags, sizes and bytes, and that it is there whole or not at all.

Run: pytest tests/test_video.py
"""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tubelet.runtime.errors import UserError
from tubelet.runtime.video import CODECS, VideoWriter, read_frames

suffixes = pytest.mark.parametrize("suffix", list(CODECS))
PRIMARIES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 0, 0), (255,) * 3]


def clip(frames: int = 12, height: int = 48, width: int = 48) -> np.ndarray:
    """A green square moving over a ramp: uint8 [frames, height, width, 3]."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 0] = np.linspace(40, 200, width).astype(np.uint8)
    for t in range(frames):
        video[t, 4:12, 2 * t : 2 * t + 8] = (0, 255, 40)
    return video


def write(path: Path, frames: np.ndarray, fps: float | Fraction = 16, chunk: int = 5) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], fps) as video:
        for start in range(0, len(frames), chunk):
            video.write(frames[start : start + chunk])
    return path


def frames_for(suffix: str) -> np.ndarray:
    return clip()[:1] if CODECS[suffix].max_frames == 1 else clip()


def boxes(data: bytes) -> Iterator[str]:
    """The names of an MP4's top-level boxes, in order."""
    position = 0
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        yield name.decode()
        position += size


def bars() -> np.ndarray:
    """Saturated colours, 16 pixels wide each: uint8 [4, 32, 128, 3]."""
    return np.tile(np.repeat(np.array(PRIMARIES, np.uint8), 16, axis=0), (4, 32, 1, 1))


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_webp_and_png_hold_every_pixel(tmp_path: Path, suffix: str) -> None:
    frames = frames_for(suffix)

    with Image.open(write(tmp_path / f"clip{suffix}", frames)) as image:
        written = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])

    np.testing.assert_array_equal(written, frames)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".gif", 1), (".mp4", 3)])
def test_gif_and_mp4_are_close_to_the_frames(tmp_path: Path, suffix: str, tolerance: float) -> None:
    frames = clip(20, 64, 80)

    written, fps = read_frames(write(tmp_path / f"clip{suffix}", frames))

    assert written.shape == frames.shape
    assert float(fps) == pytest.approx(16, rel=0.05)  # a GIF's clock ticks in 1/100 s
    assert np.abs(written.astype(int) - frames).mean() < tolerance


def test_mp4_stores_saturated_colours_as_bt709_limited_range(tmp_path: Path) -> None:
    path = write(tmp_path / "bars.mp4", bars())
    red, green, blue = np.array(PRIMARIES).T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709-6, items 3.2 to 3.4
    expected = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]

    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = [
            np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size) for plane in frame.planes
        ]

    centres = 16 * np.arange(8) + 8
    stored = [plane[8, centres // scale] for plane, scale in zip(planes, (1, 2, 2), strict=True)]
    np.testing.assert_allclose(stored, expected, atol=2)


def test_mp4_returns_saturated_colours(tmp_path: Path) -> None:
    written, _ = read_frames(write(tmp_path / "bars.mp4", bars()))

    centres = 16 * np.arange(8) + 8
    np.testing.assert_allclose(written[2, 16, centres], PRIMARIES, atol=4)


def test_mp4_is_tagged_bt709_in_the_container_and_in_the_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", clip())

    assert b"colrnclx" + struct.pack(">3HB", 1, 1, 1, 0) in path.read_bytes()
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        stream = container.streams.video[0].codec_context
        assert stream.pix_fmt == "yuv420p"
        for tags in (stream, frame):
            assert (tags.colorspace, tags.color_primaries, tags.color_trc, tags.color_range) == (1, 1, 1, 1)


def test_mp4_can_play_before_it_is_all_there(tmp_path: Path) -> None:
    order = list(boxes(write(tmp_path / "clip.mp4", clip()).read_bytes()))

    assert order.index("moov") < order.index("mdat")


@pytest.mark.parametrize(("height", "width"), [(47, 49), (1, 1), (48, 33)])
def test_odd_sizes_grow_by_repeating_the_edge_in_mp4_and_stay_elsewhere(
    tmp_path: Path, height: int, width: int
) -> None:
    frames = np.full((3, height, width, 3), 90, np.uint8)

    mp4, _ = read_frames(write(tmp_path / "clip.mp4", frames))
    gif, _ = read_frames(write(tmp_path / "clip.gif", frames))

    assert mp4.shape == (3, height + height % 2, width + width % 2, 3)
    np.testing.assert_allclose(mp4, 90, atol=3)
    assert gif.shape == frames.shape


@pytest.mark.parametrize("fps", [1, 16, 24, Fraction(30000, 1001), 12.5])
def test_mp4_keeps_its_rate_and_every_frame(tmp_path: Path, fps: float | Fraction) -> None:
    written, rate = read_frames(write(tmp_path / "clip.mp4", clip(), fps))

    assert (len(written), rate) == (12, Fraction(fps))


@suffixes
def test_the_same_frames_make_the_same_bytes_however_they_are_chunked(tmp_path: Path, suffix: str) -> None:
    frames = frames_for(suffix)

    first, second = write(tmp_path / f"a{suffix}", frames), write(tmp_path / f"other{suffix}", frames, chunk=12)

    assert first.read_bytes() == second.read_bytes()
    assert b"Lav" not in first.read_bytes()


@suffixes
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_changes_nothing(tmp_path: Path, suffix: str, error: type[BaseException]) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"older")

    with pytest.raises(error), VideoWriter(path, 48, 48, 16) as video:
        video.write(frames_for(suffix))
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"


def test_a_writer_dropped_without_close_leaves_nothing(tmp_path: Path) -> None:
    video = VideoWriter(tmp_path / "clip.mp4", 48, 48, 16)
    video.write(clip())

    del video
    gc.collect()

    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    video = VideoWriter(path, 48, 48, 16)
    video.write(clip())
    path.mkdir()

    with pytest.raises(UserError, match=r"cannot write .*clip\.mp4: .*; free space or choose"):
        video.close()

    assert list(tmp_path.iterdir()) == [path]


@suffixes
@pytest.mark.parametrize("room", [0.05, 0.999])
def test_a_full_disk_leaves_nothing(tmp_path: Path, suffix: str, room: float) -> None:
    """A limit on the file's size stands in for the disk: a share of what is needed."""
    frames = np.random.default_rng(0).integers(0, 256, frames_for(suffix).shape, np.uint8)
    older = write(tmp_path / f"clip{suffix}", frames).read_bytes()
    script = f"""
import resource, sys
import numpy as np
from tubelet.runtime.errors import UserError
from tubelet.runtime.video import VideoWriter
frames = np.random.default_rng(0).integers(0, 256, {frames.shape}, np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, ({int(room * len(older))},) * 2)
try:
    with VideoWriter(sys.argv[1], 48, 48, 16) as video:
        video.write(frames)
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, tmp_path / f"clip{suffix}"]

    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert f"clip{suffix}: File too large; free space or choose another path" in run.stdout
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [older]


def test_close_replaces_the_older_file_and_may_be_called_twice(tmp_path: Path) -> None:
    path = tmp_path / "clip.MP4"
    path.write_bytes(b"older")
    video = VideoWriter(path, 48, 48, 16)
    video.write(clip())

    video.close()
    video.close()

    assert list(tmp_path.iterdir()) == [path] and len(read_frames(path)[0]) == 12
    with pytest.raises(UserError, match="closed"):
        video.write(clip())


@pytest.mark.parametrize(("suffix", "frames"), [(".mp4", 2000), (".gif", 600)])
def test_memory_does_not_grow_with_duration(tmp_path: Path, suffix: str, frames: int) -> None:
    """The peak after all frames, 47 kB each, is within 16 MB of the peak after the first 200."""
    script = f"""
import sys
import numpy as np
from tubelet.runtime.resident import peak_resident_bytes as peak
from tubelet.runtime.video import VideoWriter
with VideoWriter(sys.argv[1], 128, 128, 16) as video:
    for start in range(0, {frames}, 20):
        if start == 200:
            early = peak()
        video.write(np.full((20, 128, 128, 3), start % 256, np.uint8))
print(peak() - early)
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path / f"clip{suffix}"], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 16e6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.avi", r"'\.avi' is not one of \.mp4, \.webp, \.gif, \.png"),
        ("clip", "suffix '' is not one of"),
        ("missing/clip.mp4", "No such file or directory; free space or choose another path"),
        ("folder.mp4", "it is a folder"),
        ("folder.mp4/" + 252 * "n" + ".mp4", "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()

    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name, 48, 48, 16)

    assert list(tmp_path.rglob("*")) == [tmp_path / "folder.mp4"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = write(tmp_path / f"{250 * 'n'}.gif", clip())

    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "width", "fps", "message"),
    [
        ("clip.mp4", 0, 16, "1 to 16383 pixels, are 0 and 48"),
        ("clip.webp", 20000, 16, "are 20000 and 48"),
        ("clip.mp4", 48, 0, "fps is 0"),
        ("clip.mp4", 48, 0.0001, "1/1000 to 1000 frames a second, fps is 0.0001"),
        ("clip.mp4", 48, float("nan"), "fps is nan"),
        ("clip.webp", 48, float("inf"), "fps is inf"),
        ("clip.gif", 48, 60, "1/655 to 50 frames a second, fps is 60"),
    ],
)
def test_a_size_or_rate_out_of_range_is_refused_at_once(
    tmp_path: Path, name: str, width: int, fps: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name, width, 48, fps)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("clip.mp4", clip().astype(np.float32), r"uint8 \[T,48,48,3\], are float32 \[12, 48, 48, 3\]"),
        ("clip.mp4", clip()[0], r"are uint8 \[48, 48, 3\]"),
        ("clip.mp4", clip(width=64), r"are uint8 \[12, 48, 64, 3\]"),
        ("clip.mp4", clip()[:0], "no frames"),
        ("clip.png", clip(2), r"\.png holds 1 frame, the clip has 2; write \.mp4, \.webp, \.gif instead"),
        ("clip.png", clip()[:0], "no frames"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tmp_path: Path, name: str, frames: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message), VideoWriter(tmp_path / name, 48, 48, 16) as video:
        video.write(frames)

    assert list(tmp_path.iterdir()) == []


def test_frames_may_be_strided_views(tmp_path: Path) -> None:
    frames = clip()
    view = frames[::-1, :, ::-1]

    plain = write(tmp_path / "plain.gif", np.ascontiguousarray(view))
    strided = write(tmp_path / "strided.gif", view)

    assert plain.read_bytes() == strided.read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not a video"])
def test_a_file_that_is_no_video_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match="cannot read video frames from"):
        read_frames(path)
