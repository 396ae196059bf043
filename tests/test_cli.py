"""The command line as a user meets it: what it writes, what it says, exit codes, and no leftovers.

pytest tests/test_cli.py
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tubelet.runtime.cli import main
from tubelet.runtime.video import read_frames

PROMPT = "a red circle moves right on a white background"
SMALL = ["--width", "48", "--height", "48", "--frames", "9", "--steps", "2"]


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def tubelet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["tubelet", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_generate_writes_the_video_and_says_so(tubelet, tmp_path: Path) -> None:
    result = tubelet("generate", PROMPT, "-o", "red.mp4", *SMALL)

    assert result.code == 0, result.err
    assert "wrote red.mp4: 9 frames of 48x48, 0.38 s at 24 fps, seed 0" in result.out
    for stage in ("load", "text", "denoise", "decode", "write"):
        assert re.search(rf"\b{stage} \d+\.\d\d s", result.out)
    frames, fps = read_frames(tmp_path / "red.mp4")
    assert frames.shape == (9, 48, 48, 3) and fps == 24
    assert [p.name for p in tmp_path.iterdir()] == ["red.mp4"]


def test_the_same_request_is_the_same_file(tubelet, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert tubelet("generate", PROMPT, "-o", name, *SMALL).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_prompts_count_sheet_and_json(tubelet, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a red circle\n\n  a blue square \n")
    result = tubelet(
        "generate", "--prompts", "list.txt", "--count", "2", "--seed", "5", "-o", "c.webp", "--sheet", "s.png",
        "--json", *SMALL,
    )  # fmt: skip

    assert result.code == 0, result.err
    clips = json.loads(result.out)["clips"]
    assert [(c["path"], c["prompt"], c["seed"]) for c in clips] == [
        ("c-1.webp", "a red circle", 5),
        ("c-2.webp", "a red circle", 6),
        ("c-3.webp", "a blue square", 5),
        ("c-4.webp", "a blue square", 6),
    ]
    assert all((tmp_path / c["path"]).exists() for c in clips)
    sheet, _ = read_frames(tmp_path / "s.png")
    assert sheet.shape[2] >= 6 * 48 and sheet.shape[1] > 4 * 48 and np.ptp(sheet) > 100


def test_seconds_and_fps(tubelet, tmp_path: Path) -> None:
    assert (
        tubelet("generate", PROMPT, "-o", "a.mp4", "--seconds", "0.7", "--fps", "12", *SMALL[:4], "--steps", "1").code
        == 0
    )
    frames, fps = read_frames(tmp_path / "a.mp4")
    assert len(frames) == 9 and fps == 12


def test_an_image(tubelet, tmp_path: Path) -> None:
    assert tubelet("generate", "a red circle", "-o", "a.png", "--frames", "1", "--steps", "2").code == 0
    assert read_frames(tmp_path / "a.png")[0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give either a PROMPT or --prompts FILE"),
        (["generate", "x", "--prompts", "y"], "give either a PROMPT or --prompts FILE"),
        (["generate", "--prompts", "absent.txt"], "cannot read absent.txt: No such file or directory"),
        (["generate", "--prompts", "latin.txt"], "latin.txt is not UTF-8 (byte 3); save it as UTF-8"),
        (["generate", "--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["generate", "x", "--width", "50"], "the nearest legal width is 48"),
        (["generate", "x", "--frames", "10"], "the nearest legal count is 9"),
        (["generate", "x", "--frames", "9", "--seconds", "1"], "--seconds and --frames exclude each other"),
        (["generate", "x", "--seconds", "nan"], "--seconds must be above 0"),
        (["generate", "x", "--fps", "0"], "--fps must be from 0.01 to 1000"),
        (["generate", "x", "--width", "2048", "--height", "2048"], "over the model's"),
        (["generate", "x", "-o", "a.avi"], ".avi"),
        (["generate", "x", "-o", "a.png"], ".png holds 1 frame, the clip has 33"),
        (["generate", "x", "-o", "absent/a.mp4"], "cannot write absent/a.mp4"),
        (["generate", "x", "-o", "folder.mp4"], "it is a folder"),
        (["generate", "x", "-o", ".", "--count", "2"], "is not one of .mp4"),
        (["generate", "x", "-o", "a" * 300 + ".mp4"], "cannot write"),
        (["generate", "x", "-o", "a.png", "--frames", "1", "--sheet", "a.png"], "is also the name of a clip"),
        (["generate", "x", "--sheet", "absent/s.png"], "cannot write absent/s.png"),
        (["generate", "x", "--sheet", "s.png", "--count", "101"], "--sheet holds up to 100 clips"),
        (
            ["generate", "x", "--sheet", "s.png", "--width", "4096", "--height", "16"],
            "--sheet would be 24588x36 pixels",
        ),
        (["generate", "x", "--count", "1000000000"], "more than the 10000 of one command"),
        (["generate", "x", "--count", "2", "--seed", "18446744073709551615"], "seed must be from 0"),
        (["generate", "--prompts", "long.txt", "-o", "a.webp"], "the prompt has 41 tokens"),
        (["generate", "x", "--threads", "10000000000"], "threads must be from 1 to 1024"),
        (["generate", "x", "--fps", "0.0001"], "--fps must be from 0.01 to 1000"),
        (["generate", "x", "--sheet", "s.jpg"], "--sheet writes a PNG, so its name must end in .png"),
        (["generate", "x", "--bundle", "absent"], "absent is not a bundle"),
        (["generate", "x", "--steps", "0"], "steps must be"),
        (["generate", "red " * 40], "the prompt has 41 tokens, the model reads 16"),
        (["generate", "x", "--count", "0"], "--count"),
        (["generate", "x", "--width", "wide"], "--width"),
        (["inspect", "absent"], "absent is not a bundle"),
        (["export", "absent", "-o", "b"], "absent is not a checkpoint"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(tubelet, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("a red circle\n" + "red " * 40)
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.iterdir())

    result = tubelet(*arguments)

    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_shows_components_hashes_and_parity(tubelet) -> None:
    result = tubelet("inspect")
    assert result.code == 0
    for word in ("denoiser", "vae_decoder", "weights.safetensors", "Parity against torch", "targets cpu", "[B,N,49]"):
        assert word in result.out
    manifest = json.loads(tubelet("inspect", "--json").out)
    assert manifest["components"]["denoiser"]["parameters"] > 10**6


def test_doctor_says_what_works(tubelet) -> None:
    findings = {f["part"]: f for f in json.loads(tubelet("doctor", "--json").out)}
    assert findings["target cpu"]["works"] and findings["embedded model"]["works"]
    assert "target rtx" in findings and findings["target rtx"]["detail"]
    assert tubelet("doctor").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_file_and_keeps_the_old_one(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "out.mp4").write_text("old")
    code = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); from tubelet.runtime.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", PROMPT, "-o", "out.mp4", "--steps", "1000"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:  # the writer's temporary file
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert "interrupted" in errors and "Traceback" not in errors
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "old"


def test_under_nohup_a_hangup_is_ignored(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from tubelet.runtime.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", PROMPT, "-o", "out.mp4", "--steps", "100"], cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:  # the writer's temporary file
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)

    assert process.wait(timeout=120) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
