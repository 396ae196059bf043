"""Proves what a model gets of a file that a caller brings, for one file of every kind, and what no file can do.

Run: pytest tests/test_media.py
"""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import subprocess
import sys
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from tubelet.runtime import media
from tubelet.runtime.errors import UserError
from tubelet.runtime.fit import Fit
from tubelet.runtime.media import Limits, read_clip, resample
from tubelet.runtime.video import VideoWriter

DAY = 24 * 3600  # seconds
TURNS = {  # EXIF's number: the display matrix (a, b, c, d) of the same turn
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.fixture(autouse=True)
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Neither FFmpeg nor Pillow writes on the terminal, whatever the file."""
    yield
    assert capfd.readouterr() == ("", "")


def read(path: Path | str, fps: float | Fraction = 16, fit: Fit = Fit.CROP, **limits: int) -> np.ndarray:
    """At the size that the file has."""
    return read_clip(path, fps, lambda shown: shown, fit, Limits(**limits))


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: float | Fraction = 16,
    times: Sequence[int] | None = None,  # ms
    codec: str = "libx264",
    pixels: str = "yuv444p",
    source: str = "rgb24",
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes pictures of the format `source` without loss, but for the conversion to `pixels`."""
    with av.open(str(path), "w", container_options=options or {}) as container:
        lossless = {"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {}
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=lossless)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        tick = Fraction(1, 1000) if times else 1 / stream.codec_context.framerate
        stream.codec_context.time_base = tick
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format=source)
            frame.pts, frame.time_base = times[index] if times else index, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbered(count: int, height: int = 16, width: int = 16) -> list[np.ndarray]:
    """Flat pictures, whose grey level is their number times 4."""
    return [np.full((height, width, 3), 4 * index, np.uint8) for index in range(count)]


def numbers(clip: np.ndarray) -> list[int]:
    """Which of the `numbered` pictures a clip shows."""
    assert clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3
    assert np.ptp(clip.astype(int), axis=(1, 2, 3)).max() <= 2
    return [round(float(picture.mean()) / 4) for picture in clip]


def noise(height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    """Random colours that change slowly."""
    rough = np.random.default_rng(height * width).integers(0, 256, (3, 4, channels), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Time


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 60, 12.5, 16, 30, Fraction(1, 2)])
def test_any_rate_becomes_the_wanted_one(tmp_path: Path, rate: float | Fraction) -> None:
    path = encode(tmp_path / "clip.mp4", numbered(30), rate)

    clip = read(path, fps=16)

    count = ceil(30 / Fraction(rate) * 16 - Fraction(1, 2))
    assert numbers(clip) == [floor((k + Fraction(1, 2)) / 16 * Fraction(rate)) for k in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_keeps_its_times(tmp_path: Path, suffix: str) -> None:
    times = [0, 40, 80, 700, 710, 720, 730, 1500, 1540, 2500, 2540]
    path = encode(tmp_path / f"clip{suffix}", numbered(len(times)), 25, times)

    shown = numbers(read(path, fps=10))

    assert shown[:25] == [sum(time <= 100 * k + 50 for time in times) - 1 for k in range(25)]
    assert set(shown[25:]) <= {10}  # its own duration is up to the encoder


def test_a_gif_keeps_its_times_to_the_end_of_the_last_frame(tmp_path: Path) -> None:
    pictures = [Image.fromarray(picture) for picture in numbered(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 500, 100, 1000])

    assert numbers(read(tmp_path / "a.gif", fps=10)) == [0] + 5 * [1] + [2] + 10 * [3]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp", ".tiff", ".avif", ".ppm"])
def test_an_image_is_one_frame_at_any_rate(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(numbered(9)[8]).save(tmp_path / f"a{suffix}", **({"duration": 9000} if suffix == ".gif" else {}))

    assert numbers(read(tmp_path / f"a{suffix}", fps=60)) == [8]


@given(
    gaps=st.lists(st.integers(0, 400), max_size=8),
    last=st.integers(0, 400),
    fps=st.sampled_from([Fraction(16), Fraction(24000, 1001), Fraction(1), Fraction(25, 2)]),
)
@settings(max_examples=100, deadline=None)
def test_resampling_shows_what_is_on_at_the_middle_of_each_interval(gaps: list[int], last: int, fps: Fraction) -> None:
    starts = [Fraction(sum(gaps[:index]), 1000) for index in range(len(gaps) + 1)]
    ends = [*starts[1:], starts[-1] + Fraction(last, 1000)]

    found = list(resample([(s, e, index) for index, (s, e) in enumerate(zip(starts, ends, strict=True))], fps))

    shown, k = [], 0
    while (middle := (k + Fraction(1, 2)) / fps) < ends[-1]:
        shown.append(max(index for index, start in enumerate(starts) if start <= middle))
        k += 1
    expected = (shown or [len(gaps)]) if gaps else [0]
    assert [index for index, times in found for _ in range(times)] == expected
    assert all(times > 0 for _, times in found)


def test_time_that_runs_backwards_ends_no_frame_twice() -> None:
    timed = [(Fraction(start), Fraction(start + 1), start) for start in (0, 2, 1, 4)]

    assert list(resample(timed, Fraction(1))) == [(0, 2), (1, 2), (4, 1)]


def test_frames_that_are_never_shown_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    fitted = media.fitted
    monkeypatch.setattr(media, "fitted", lambda *arguments: converted.append(1) or fitted(*arguments))

    clip = read(encode(tmp_path / "clip.mp4", numbered(60), 60), fps=5)

    assert len(clip) == len(converted) == 5


# Size


@pytest.mark.parametrize(("height", "width"), [(1, 1), (47, 49), (33, 64)])
def test_odd_sizes_stay(tmp_path: Path, height: int, width: int) -> None:
    picture = noise(height, width)
    Image.fromarray(picture).save(tmp_path / "a.png")
    video = encode(tmp_path / "a.mkv", [picture] * 2, codec="ffv1", pixels="yuv420p")

    np.testing.assert_array_equal(read(tmp_path / "a.png"), picture[None])
    assert read(video).shape == (2, height, width, 3)
    assert np.abs(read(video).astype(int) - picture).mean() < 6  # 4:2:0


@pytest.mark.parametrize("shape", [(96, 128), (90, 160), (128, 96)])
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (192, 80), (66, 114)])
@pytest.mark.parametrize("fit", Fit)
def test_pictures_are_fitted_as_pillow_does_it(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int], fit: Fit
) -> None:
    image = Image.fromarray(noise(*shape))
    image.save(tmp_path / "a.png")

    (found,) = read_clip(tmp_path / "a.png", 16, lambda _: size, fit)

    expected = np.zeros((size[1], size[0], 3), int)
    if fit is Fit.LETTERBOX:
        inside = ImageOps.contain(image, size)
        left, top = (size[0] - inside.width) // 2, (size[1] - inside.height) // 2
        expected[top : top + inside.height, left : left + inside.width] = inside
    else:
        expected[:] = ImageOps.fit(image, size) if fit is Fit.CROP else image.resize(size)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 3  # a crop may begin half a pixel beside Pillow's
    np.testing.assert_array_equal(found.max(axis=2) == 0, expected.max(axis=2) == 0)


def test_the_size_is_asked_for_once_and_of_what_is_shown(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(5, 48, 60), aspect=Fraction(4, 3))
    asked = []

    clip = read_clip(path, 16, lambda shown: asked.append(shown) or (20, 12))

    assert asked == [(80, 48)]
    assert clip.shape == (5, 12, 20, 3) and numbers(clip) == [0, 1, 2, 3, 4]


def test_a_line_can_be_letterboxed_but_not_cropped(tmp_path: Path) -> None:
    Image.new("RGB", (10_000, 1), "white").save(tmp_path / "a.png")

    (found,) = read_clip(tmp_path / "a.png", 16, lambda _: (512, 512), Fit.LETTERBOX)

    assert found.sum() == 512 * 3 * 255
    with pytest.raises(UserError, match="10000x1 is too long to crop to 512x512; letterbox it"):
        read_clip(tmp_path / "a.png", 16, lambda _: (512, 512))


@pytest.mark.parametrize("exif", TURNS)
def test_a_display_matrix_turns_a_video(tmp_path: Path, exif: int) -> None:
    stored = noise()
    path = encode(tmp_path / "a.mp4", [stored] * 2)
    data = bytearray(path.read_bytes())
    a, b, c, d = (65536 * entry for entry in TURNS[exif])
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)

    found = read(file(path, bytes(data)))

    np.testing.assert_allclose(found[0].astype(int), turned(stored, exif), atol=4)


@pytest.mark.parametrize("exif", TURNS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_exif_turns_an_image(tmp_path: Path, exif: int, suffix: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = exif
    Image.fromarray(noise()).save(tmp_path / f"a{suffix}", exif=tags, quality=95)

    (found,) = read(tmp_path / f"a{suffix}")

    assert found.shape == turned(noise(), exif).shape
    assert np.abs(found.astype(int) - turned(noise(), exif)).mean() < 3


def turned(picture: np.ndarray, exif: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = exif
    return np.asarray(ImageOps.exif_transpose(image)).astype(int)


# Colour


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_black(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(noise(channels=4)).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    image.save(tmp_path / "a.png")

    (found,) = read(tmp_path / "a.png")

    layer = Image.open(tmp_path / "a.png").convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")
    np.testing.assert_allclose(found.astype(int), np.asarray(expected), atol=1)


def test_what_transparency_hides_does_not_leak_when_scaled(tmp_path: Path) -> None:
    layer = np.zeros((40, 40, 4), np.uint8)
    layer[:, :21, :3] = 255  # white, but transparent
    layer[:, 21:] = (0, 0, 0, 255)
    Image.fromarray(layer).save(tmp_path / "a.png")

    assert read_clip(tmp_path / "a.png", 16, lambda _: (10, 10)).max() == 0


def test_a_gif_with_transparency_reads_as_pillow_shows_it(tmp_path: Path) -> None:
    layers = np.zeros((3, 24, 32, 4), np.uint8)
    for index, layer in enumerate(layers):
        layer[4:12, 8 * index : 8 * index + 8] = (250, 40 * index, 10, 255)
    images = [Image.fromarray(layer) for layer in layers]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, disposal=2)

    found = read(tmp_path / "a.gif", fps=10)

    with Image.open(tmp_path / "a.gif") as image:
        shown = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    expected = [np.asarray(Image.alpha_composite(Image.new("RGBA", f.size, "black"), f).convert("RGB")) for f in shown]
    np.testing.assert_array_equal(found, expected)


def test_a_transparent_video_lies_on_black(tmp_path: Path) -> None:
    layer = np.full((16, 16, 4), 200, np.uint8)
    layer[:, 8:, 3] = 0
    path = encode(tmp_path / "a.mkv", [layer] * 2, codec="ffv1", pixels="bgra", source="rgba")

    found = read(path)

    assert found.shape == (2, 16, 16, 3)
    assert np.unique(found[:, :, :8]) == [157] and np.unique(found[:, :, 8:]) == [0]  # 200 * 200 / 255


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "LA"])
def test_a_grey_mask_keeps_black_white_and_grey(tmp_path: Path, mode: str) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, 8:24] = 255
    mask[8:24, 32:] = 0 if mode == "1" else 100
    image = Image.fromarray(mask.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(mask).convert(mode)
    image.save(tmp_path / "a.png")

    np.testing.assert_allclose(read(tmp_path / "a.png")[0], np.repeat(mask[..., None], 3, axis=2), atol=1)
    half = read_clip(tmp_path / "a.png", 16, lambda _: (24, 16))[0]
    assert (half[..., 0] == half[..., 2]).all() and half[8, 8, 0] == 255 and half[1, 1, 0] == 0


@pytest.mark.parametrize("pixels", ["gray", "gray10le", "gray16le"])
def test_a_grey_video_keeps_its_levels(tmp_path: Path, pixels: str) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    path = encode(tmp_path / "a.mkv", [ramp] * 2, codec="ffv1", pixels=pixels, source="gray")

    np.testing.assert_allclose(read(path)[1, 2].astype(int), np.repeat(np.arange(256)[:, None], 3, axis=1), atol=1)


@pytest.mark.parametrize(
    ("red", "blue", "matrix"), [(0.2126, 0.0722, 1), (0.299, 0.114, 5), (0.299, 0.114, 2), (0.2627, 0.0593, 9)]
)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p", "yuv420p10le", "yuv422p10le"])
def test_colours_follow_the_tags(tmp_path: Path, red: float, blue: float, matrix: int, full: bool, pixels: str) -> None:
    """Matrices: BT.709, BT.601, none, BT.2020. Flat colours go in as YUV, and come out by the standards' formula."""
    luma, cb, cr = 150, 100, 140
    width = 2 if pixels.endswith("10le") else 1  # bytes of a sample
    frame = av.VideoFrame(16, 16, pixels)
    for plane, level in zip(frame.planes, (luma, cb, cr), strict=True):
        plane.update(np.full(plane.buffer_size // width, level * 4 ** (width - 1), f"<u{width}").tobytes())
    frame.colorspace, frame.color_range, frame.pts = matrix, 1 + full, 0
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 16, 16, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    found = read(tmp_path / "a.mkv")[0, 8, 8]

    y, u, v = luma / 255, (cb - 128) / 255, (cr - 128) / 255
    if not full:
        y, u, v = (luma - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    np.testing.assert_allclose(found, 255 * np.array([r, g, b]), atol=1.5)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_reads_as_pillow_does_it(tmp_path: Path, how: dict[str, Any]) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.jpg", quality=95, **how)

    (found,) = read(tmp_path / "a.jpg")

    assert np.abs(found.astype(int) - np.asarray(Image.open(tmp_path / "a.jpg"))).mean() < 2


def test_of_several_jpegs_in_a_file_the_first_counts(tmp_path: Path) -> None:
    """Phones append the brightness of highlights as another JPEG."""
    path = tmp_path / "a.jpg"
    Image.fromarray(numbered(9)[8]).convert("L").save(path)

    assert numbers(read(file(path, 3 * path.read_bytes()), fps=60)) == [8]


# Files that are no media


def archive(kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as zipped:
            zipped.writestr("a.txt", "text" * 1000)
    else:
        with tarfile.open(fileobj=data, mode=kind) as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    return data.getvalue()


def sound() -> bytes:
    data = io.BytesIO()
    with wave.open(data, "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        writer.writeframes(bytes(8000))
    return data.getvalue()


NO_MEDIA = {
    "text": b"a green square\n" * 100,
    "html": b"<!doctype html><html><body><img src='a.png'></body></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='neighbour.mp4'/></svg>",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nneighbour.mp4\n#EXT-X-ENDLIST\n",
    "ffconcat": b"ffconcat version 1.0\nfile neighbour.mp4\n",
    "sdp": b"v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>neighbour.mp4</BaseURL></MPD>",
    "zip": archive("zip"),
    "tar": archive("w"),
    "tar.gz": archive("w:gz"),
    "wav": sound(),
    "zeros": bytes(10_000),
}


@pytest.mark.parametrize("kind", NO_MEDIA)
@pytest.mark.parametrize("suffix", ["own", ".mp4", ".png"])
def test_a_file_that_is_no_media_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    encode(tmp_path / "neighbour.mp4", numbered(3))
    path = file(tmp_path / f"a{'.' + kind if suffix == 'own' else suffix}", NO_MEDIA[kind])

    with pytest.raises(UserError, match=r"cannot read .*a.*: .*; if it is whole, and a video or an image, convert it"):
        read(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.mp4 has 0 bytes, a video or an image has 1 to"):
        read(file(tmp_path / "a.mp4", b""))


def add_silence(container: Any, seconds: int) -> None:
    stream = container.add_stream("pcm_s16le", rate=8000)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * seconds), np.int16), layout="mono")
    silence.sample_rate, silence.pts = 8000, 0
    container.mux(stream.encode(silence))


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        add_silence(container, 1)

    with pytest.raises(UserError, match=r"a\.mkv holds no video that can be decoded; convert it"):
        read(tmp_path / "a.mkv")


def test_an_image_in_tiles_is_refused(tmp_path: Path) -> None:
    """As phones write .heic; FFmpeg alone would show one tile."""
    path = file(tmp_path / "a.avif", tiled("red", "blue"))

    with Image.open(path) as image:
        assert image.size == (128, 64) and image.convert("RGB").getpixel((100, 10))[2] > 250
    with pytest.raises(UserError, match=r"a\.avif is stored in tiles, which are not put together here; convert it"):
        read(path)


def box(name: bytes, *parts: bytes, version: int | None = None) -> bytes:
    body = b"".join(parts) if version is None else struct.pack(">I", version << 24) + b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def content(data: bytes, name: bytes) -> bytes:
    """Of the first box of that name."""
    start = data.index(name)
    return data[start + 4 : start - 4 + struct.unpack_from(">I", data, start - 4)[0]]


def tiled(*colours: str) -> bytes:
    """An AVIF of tiles of 64x64 beside each other (ISO/IEC 23008-12, 6.6.2.3)."""
    items, count = [], len(colours)
    for colour in colours:
        tile = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(tile, "AVIF")
        items.append(content(tile.getvalue(), b"mdat"))
        config = content(tile.getvalue(), b"av1C")
    items.append(struct.pack(">4B2H", 0, 0, 0, count - 1, 64 * count, 64))
    entries = [box(b"infe", struct.pack(">2H", n, 0), b"av01\0", version=2) for n in range(1, count + 1)]
    entries.append(box(b"infe", struct.pack(">2H", count + 1, 0), b"grid\0", version=2))
    tiles = struct.pack(f">{count + 2}H", count + 1, count, *range(1, count + 1))
    sizes = [box(b"ispe", struct.pack(">2I", width, 64), version=0) for width in (64, 64 * count)]
    uses = [struct.pack(">H3B", n, 2, 1, 0x82) for n in range(1, count + 1)] + [struct.pack(">H2B", count + 1, 1, 3)]

    def meta(start: int) -> bytes:
        places = [start + sum(map(len, items[:n])) for n in range(count + 1)]
        located = [struct.pack(">3H2I", n + 1, 0, 1, places[n], len(items[n])) for n in range(count + 1)]
        return box(
            b"meta",
            box(b"hdlr", bytes(4), b"pict", bytes(13), version=0),
            box(b"pitm", struct.pack(">H", count + 1), version=0),
            box(b"iloc", struct.pack(">2BH", 0x44, 0, count + 1), *located, version=0),
            box(b"iinf", struct.pack(">H", count + 1), *entries, version=0),
            box(b"iref", box(b"dimg", tiles), version=0),
            box(
                b"iprp",
                box(b"ipco", sizes[0], box(b"av1C", config), sizes[1]),
                box(b"ipma", struct.pack(">I", count + 1), *uses, version=0),
            ),
            version=0,
        )

    start = box(b"ftyp", b"avif", bytes(4), b"avifmif1")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", *items)


@pytest.mark.parametrize("kind", ["m3u8", "ffconcat"])
def test_no_address_is_opened(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        path = file(tmp_path / f"a.{kind}", NO_MEDIA[kind].replace(b"neighbour.mp4", address.encode()))
        for name in (path, address):
            with pytest.raises(UserError, match=r"cannot read|there is no file"):
                read(name)

        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "name", ["http://x/y.mp4", "concat:a.mp4|b.mp4", "pipe:0", "file:a.mp4", "", "a.mp4/b", "a\0b"]
)
def test_a_name_is_only_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a.mp4", numbered(3))

    with pytest.raises(UserError, match=r"there is no file .*; give the path of a video or an image"):
        read(name)


@pytest.mark.parametrize("name", ["concat:a.mp4", "data:video,a.mp4", "a%03d.png", "a.m3u8", "-", "Zoë 猫.mp4"])
def test_a_file_of_any_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "real.mp4", numbered(3)).rename(tmp_path / name)

    assert numbers(read(name)) == [0, 1, 2]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a file; give the path of a video or an image"):
            read(path)


# Damage


@pytest.mark.parametrize(
    "name", ["front.mp4", "back.mp4", "a.mkv", "a.avi", "a.gif", "a.png", "a.jpg", "a.webp", "a.bmp"]
)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    path, pictures = tmp_path / name, [np.roll(noise(), 3 * index, axis=1) for index in range(32)]
    if name == "a.avi":
        encode(path, pictures, codec="mjpeg", pixels="yuvj420p")
    elif name.endswith((".mp4", ".mkv")):
        encode(path, pictures, options={"movflags": "+faststart"} if name == "front.mp4" else {})
    else:
        images = [Image.fromarray(picture) for picture in pictures]
        images[0].save(path, **({"save_all": True, "append_images": images[1:]} if name == "a.gif" else {}))
    whole = path.read_bytes()
    assert len(read(path))

    for share in (0.05, 0.4, 0.7):
        with pytest.raises(UserError, match=r"cut short|cannot read"):
            read(file(path, whole[: int(share * len(whole))]))


def test_a_video_that_is_cut_between_two_frames_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(20), options={"movflags": "+faststart"})
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux() if packet.size]

    with pytest.raises(UserError, match=r"a\.mp4 is cut short after 15 frames and 0\.94 seconds; copy it again"):
        read(file(path, path.read_bytes()[: ends[14]]))


def test_sound_may_last_longer_than_the_pictures(tmp_path: Path) -> None:
    video = encode(tmp_path / "a.mkv", numbered(16))
    with av.open(str(video)) as source, av.open(str(tmp_path / "b.mkv"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        add_silence(container, 3)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)

    assert numbers(read(tmp_path / "b.mkv")) == list(range(16))


def test_damage_is_an_error_or_shows_but_is_no_crash(tmp_path: Path) -> None:
    chance = random.Random(0)
    Image.fromarray(noise()).save(tmp_path / "a.png")
    Image.fromarray(noise()).save(tmp_path / "a.gif")
    encode(tmp_path / "a.mp4", [noise()] * 3)
    for path in (tmp_path / "a.png", tmp_path / "a.gif", tmp_path / "a.mp4"):
        whole = path.read_bytes()
        for _ in range(10):
            data = bytearray(whole)
            for _ in range(5):
                data[chance.randrange(min(len(data), 1000))] = chance.randrange(256)
            try:
                assert read_clip(file(path, bytes(data)), 16, lambda _: (8, 8)).shape[1:] == (8, 8, 3)
            except UserError as error:
                assert str(path) in str(error)


def test_metadata_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, 16, 16, comment="PLACEHOLDER") as writer:
        writer.write(np.stack(numbered(3)))

    assert numbers(read(file(path, path.read_bytes().replace(b"PLACEHOLDER", b"\xff\xfe\xe9CEHOLDER")))) == [0, 1, 2]


# Limits


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"bytes": 1000}, r"a\.mp4 has \d{4,} bytes, a video or an image has 1 to 1000"),
        ({"pixels": 48 * 64 - 1}, r"a\.mp4 has frames of 64x48, over 3071 pixels, the limit"),
        ({"frames": 31}, r"a\.mp4 has over 31 frames, the limit; cut it first"),
        ({"seconds": 1}, r"a\.mp4 lasts over 1 seconds, the limit; cut it first"),
    ],
)
def test_a_file_over_a_limit_is_refused(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    path = encode(tmp_path / "a.mp4", [noise()] * 32)

    assert len(read(path, bytes=100_000, pixels=48 * 64, frames=32, seconds=2)) == 32
    with pytest.raises(UserError, match=message):
        read(path, **limits)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_still_that_lasts_for_a_day_is_refused(tmp_path: Path, suffix: str) -> None:
    path = encode(tmp_path / f"a{suffix}", numbered(3), times=[0, 40, DAY * 1000])

    with pytest.raises(UserError, match="lasts over 120 seconds, the limit"):
        read(path)


def test_a_gap_is_measured_where_the_header_does_not_tell(tmp_path: Path) -> None:
    pictures = [Image.fromarray(picture) for picture in numbered(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 655_000, 100, 100])

    with pytest.raises(UserError, match="lasts over 120 seconds, the limit"):
        read(tmp_path / "a.gif")


def png(width: int, height: int) -> bytes:
    """A grey PNG whose header tells any size; there is data for few rows."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(10_000_000), 1),
        b"IEND": b"",
    }
    blocks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


def test_memory_is_not_taken_for_what_a_header_says_nor_for_frames_at_full_size(tmp_path: Path) -> None:
    """400 MB are left for a PNG that says it has 900 MB and a GIF that says 8 GB; then come 48 frames of 2.8 MB."""
    big = file(tmp_path / "a.png", png(30_000, 30_000))
    Image.new("L", (9, 9)).save(tmp_path / "a.gif")
    huge = file(tmp_path / "a.gif", b"GIF89a" + 4 * b"\xff" + (tmp_path / "a.gif").read_bytes()[10:])
    flat = np.zeros((720, 1280), np.uint8)
    video = encode(tmp_path / "a.mkv", [flat] * 48, codec="ffv1", pixels="gray", source="gray")
    script = """
import resource, sys
from tubelet.runtime.errors import UserError
from tubelet.runtime.media import read_clip
from tubelet.runtime.resident import peak_resident_bytes as peak
taken = resource.getpagesize() * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (taken + 400_000_000,) * 2)
early = peak()
for path in sys.argv[1:]:
    try:
        print(read_clip(path, 16, lambda _: (64, 64)).shape, peak() - early < 80e6)
    except UserError as error:
        print(error)
"""

    run = subprocess.run([sys.executable, "-c", script, big, huge, video], capture_output=True, text=True)

    assert run.returncode == 0 and not run.stderr, run.stderr
    png_error, gif_error, shape = run.stdout.splitlines()
    assert "a.png" in png_error and "over 67108864 pixels" in png_error
    assert "a.gif" in gif_error and "over 67108864 pixels" in gif_error
    assert shape == "(48, 64, 64, 3) True"
