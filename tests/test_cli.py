"""The command line as a user meets it: what it writes, what it says, exit codes, and no leftovers.

pytest tests/test_cli.py
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tubelet.runtime import VideoWriter, comment
from tubelet.runtime.recipe import Recipe
from tubelet.runtime.video import read_frames

PROMPT = "a red circle moves right on a white background"
SMALL = ["--width", "48", "--height", "48", "--frames", "9", "--steps", "2"]


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


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "a.png"])
def test_a_file_says_how_it_was_made_and_is_made_again(tubelet, tmp_path: Path, name: str) -> None:
    sampling = ["--steps", "2", "--seed", "7", "--shift", "3", "--negative-prompt", "a square", "--width", "32"]
    frames = ["--frames", "1"] if name.endswith("png") else ["--frames", "5", "--fps", "12"]
    assert tubelet("generate", PROMPT, "-o", name, *sampling, *frames).code == 0

    told = tubelet("inspect", name)
    assert PROMPT in " ".join(told.out.replace("│", " ").split()) and "command generate" in told.out
    options = json.loads(tubelet("inspect", name, "--json").out)["options"]
    assert (options["prompt"], options["seed"], options["shift"], options["width"]) == (PROMPT, 7, 3, 32)

    again = f"b{name[1:]}"
    assert tubelet("generate", "--like", name, "-o", again).code == 0
    assert (tmp_path / again).read_bytes() == (tmp_path / name).read_bytes()
    assert tubelet("generate", "--like", name, "-o", again, "--seed", "8").code == 0
    assert (tmp_path / again).read_bytes() != (tmp_path / name).read_bytes()


def test_pictures_and_storyboards_are_repeated_too(tubelet, tmp_path: Path) -> None:
    assert tubelet("generate", "a red circle", "-o", "i.png", "--frames", "1", "--steps", "2").code == 0
    (tmp_path / "board.txt").write_text("0: a red circle\n0.25: a red circle moves right\n")
    for name, arguments in {
        "image": [PROMPT, "--image", "i.png", "--keyframe", "8:i.png", "--frames", "9"],
        "board": ["--storyboard", "board.txt", "--seconds", "0.5", "--width", "32", "--height", "32"],
    }.items():
        result = tubelet("generate", *arguments, "--steps", "2", "-o", f"{name}.mp4")
        assert result.code == 0, result.err
        assert tubelet("generate", "--like", f"{name}.mp4", "-o", "again.mp4").code == 0
        assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / f"{name}.mp4").read_bytes()
    (tmp_path / "i.png").write_bytes((tmp_path / "i.png").read_bytes() + b"x")
    enhanced = tubelet("generate", "--like", "board.mp4", "--enhance")
    assert enhanced.code == 2 and "--enhance works on PROMPT and --prompts, not on scenes" in enhanced.err
    changed = tubelet("generate", "--like", "image.mp4", "-o", "again.mp4")
    assert changed.code == 2 and "i.png is not the picture that was used" in changed.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": "fast"}, "fps must be float, is 'fast'"),
        ({"steps": None}, "steps must be"),
        ({"extra": 1}, "has unknown ['extra']"),
        ({"keyframes": {"x": ["a", "b"]}}, "is at 'x'"),
        ({"scenes": [[0]]}, "scenes[0] must have 2 entries"),
        ({"fit": "magic"}, "fit must be one of crop, letterbox, stretch"),
    ],
)
def test_a_damaged_recipe_is_refused(tubelet, tmp_path: Path, change: dict, message: str) -> None:
    assert tubelet("generate", PROMPT, "-o", "a.png", "--frames", "1", "--steps", "1").code == 0
    recipe = Recipe.parse(comment.get(tmp_path / "a.png"))
    assert recipe is not None
    damaged = dataclasses.replace(recipe, options={**recipe.options, **change})
    with VideoWriter(tmp_path / "b.png", 64, 64, 24, damaged.text()) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    result = tubelet("generate", "--like", "b.png", "-o", "c.png")
    assert result.code == 2 and message in result.err.replace("\n", " ")


def test_every_task_makes_a_file_from_files(tubelet, tmp_path: Path) -> None:
    assert tubelet("generate", PROMPT, "-o", "a.mp4", *SMALL).code == 0
    mask = np.zeros((1, 48, 48, 3), np.uint8)
    mask[:, 16:, 16:] = 255
    with VideoWriter(tmp_path / "mask.png", 48, 48, 24) as writer:
        writer.write(mask)
    for arguments, frames in {
        ("extend", "a.mp4", "--seconds", "0.5"): 9 + 12,
        ("extend", "a.mp4", "--seconds", "0.5", "--backward", "--context", "1"): 9 + 12,
        ("loop", "a.mp4", "--seconds", "0.25"): 9 + 7,
        ("connect", "a.mp4", "a.mp4", PROMPT, "--seconds", "0.5"): 18 + 15,
        ("edit", "a.mp4", "a blue circle"): 9,
        ("variation", "a.mp4"): 9,
        ("inpaint", "a.mp4", "a blue circle", "--mask", "mask.png"): 9,
        ("blend", "a.mp4", "a.mp4"): 9,
        ("blend", "a.mp4", "a.mp4", "--by", "latents"): 9,
    }.items():
        result = tubelet(*arguments, "--steps", "2", "-o", "b.mp4", "--json")
        assert result.code == 0, (arguments, result.err)
        (clip,) = json.loads(result.out)["clips"]
        assert clip["frames"] == len(read_frames(tmp_path / "b.mp4")[0]) == frames, arguments
        assert json.loads(tubelet("inspect", "b.mp4", "--json").out)["command"] == arguments[0]
        assert clip["prompt"] == (arguments[2] if arguments[0] in ("edit", "inpaint") else PROMPT)
        if arguments == ("blend", "a.mp4", "a.mp4"):
            assert (clip["sampler"], clip["guidance"], clip["strength"]) == ("euler", 1, 1)
    repeated = tubelet("generate", "--like", "b.mp4")
    assert repeated.code == 2 and "was made by `tubelet blend`" in repeated.err


def test_a_folder_is_captioned_and_captioning_goes_on(tubelet, tmp_path: Path) -> None:
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    for name in ("clips/a.mp4", "clips/deep/b.webp", "clips/deep/c.png"):
        frames = ["--frames", "1"] if name.endswith("png") else SMALL[4:]
        assert tubelet("generate", PROMPT, "-o", name, "--width", "48", "--height", "48", *frames).code == 0
    (tmp_path / "clips" / "bad.mp4").write_text("no video")
    (tmp_path / "clips" / "notes.txt").write_text("not looked at")

    first = tubelet("caption", "clips", "-o", "c.jsonl")
    assert first.code == 0 and "skipped" in first.err and "bad.mp4" in first.err
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    files = [json.loads(line)["file"] for line in lines]
    assert {"a.mp4", "deep/c.png"} <= set(files) and all(json.loads(line)["caption"] for line in lines)

    cut = "".join(line + "\n" for line in lines[:-1]) + lines[-1][:20]  # as a killed run leaves it
    (tmp_path / "c.jsonl").write_text(cut)
    again = json.loads(tubelet("caption", "clips", "-o", "c.jsonl", "--json").out)
    assert again["written"] == 1 and again["kept"] == len(lines) - 1
    assert "bad.mp4" in [skipped["file"] for skipped in again["skipped"]]
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines


def test_a_clip_of_unknown_origin_is_described_for_its_task(tubelet, tmp_path: Path) -> None:
    assert tubelet("generate", PROMPT, "-o", "a.mp4", "--width", "48", "--height", "48").code == 0
    frames, fps = read_frames(tmp_path / "a.mp4")
    with VideoWriter(tmp_path / "plain.mp4", 48, 48, fps) as writer:
        writer.write(frames)
    result = tubelet("variation", "plain.mp4", "--steps", "2", "-o", "b.mp4")
    assert result.code == 0 and "prompt: a red circle" in result.err


@pytest.mark.parametrize(("name", "kind"), [("a.png", "JPEG"), ("a.mp4", "PNG"), ("a.gif", "GIF")])
def test_a_clip_whose_comment_cannot_be_read_is_described(tubelet, tmp_path: Path, name: str, kind: str) -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / name, kind, comment="café".encode("latin-1"))

    result = tubelet("variation", name, "--steps", "1", "-o", "b.png")

    assert result.code == 0 and "prompt: a red square" in result.err, result.err


def test_a_picture_may_be_larger_than_a_clip(tubelet, tmp_path: Path) -> None:
    assert tubelet("generate", PROMPT, "-o", "a.png", "--frames", "1", "--steps", "1").code == 0
    result = tubelet("edit", "a.png", "x", "--width", "352", "--height", "352", "--steps", "1", "-o", "b.png")
    assert result.code == 0, result.err
    clip = tubelet("generate", "x", "--width", "352", "--height", "352")
    assert clip.code == 2 and "with 33 frames is 4356 tokens" in clip.err


def test_a_prompt_is_enhanced_by_rules(tubelet) -> None:
    result = tubelet("generate", "a blue ball", "--enhance", "-o", "a.mp4", "--json", *SMALL)
    (clip,) = json.loads(result.out)["clips"]
    assert clip["prompt"].startswith("a blue circle ") and f"prompt: {clip['prompt']}" in result.err
    late = tubelet("generate", "a blue ball", "--enhance", "--steps", "0")
    assert late.code == 2 and "steps must be" in late.err and "prompt:" not in late.err
    unknown = tubelet("generate", "a dragon", "--enhance")
    assert unknown.code == 2 and "can show nothing of 'a dragon'" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "absent"], "absent is not a folder"),
        (["caption", "empty"], "empty holds no video or image"),
        (["caption", ".", "-o", "list.txt"], "list.txt is not a file of captions"),
        (["caption", ".", "--beams", "0"], "--beams"),
        (["caption", ".", "--chat-url", "http://x"], "give both --chat-url and --chat-model"),
        (
            ["caption", ".", "--beams", "4", "--chat-url", "http://x", "--chat-model", "m"],
            "--beams 4 is for the model's captioner; leave it out with --chat-url",
        ),
        (["generate", "x", "--enhance", "--chat-url", "ftp://x", "--chat-model", "m"], "ftp://x"),
        (["generate", "--storyboard", "late.txt", "--enhance"], "--enhance works on PROMPT and --prompts"),
        (["generate", "x", "--chat-url", "http://x"], "give --enhance too, or leave them out"),
        (["generate", "x", "--fit", "letterbox"], "--fit letterbox is for pictures, and there is none; give --image"),
        (["generate"], "give either a PROMPT or --prompts FILE"),
        (["generate", "x", "--storyboard", "board.txt"], "give either a PROMPT or --prompts FILE"),
        (["generate", "--storyboard", "list.txt"], "line 1 of list.txt is 'a red circle'; write SECONDS: PROMPT"),
        (
            ["generate", "--storyboard", "minutes.txt"],
            "line 2 of minutes.txt is '1:30: a red circle'; write SECONDS: PROMPT",
        ),
        (["generate", "--storyboard", "late.txt"], "scenes must start at frame 0"),
        (["generate", "--like", "absent.mp4"], "absent.mp4"),
        (["generate", "--like", "plain.png"], "plain.png does not say how it was made"),
        (["generate", "x", "--image", "absent.png"], "No such file or directory; give the path of a video or an image"),
        (["generate", "x", "--image", "list.txt"], "cannot read list.txt"),
        (["generate", "x", "--keyframe", "plain.png"], "--keyframe 'plain.png' must be FRAME:FILE"),
        (["generate", "x", "--keyframe", "40:plain.png"], "keyframe 40 is outside the frames 0 to 32"),
        (["generate", "x", "--image", "plain.png", "--keyframe", "0:plain.png"], "frame 0 is given two pictures"),
        (["generate", "x", "--image", "plain.png", "--width", "64"], "give both --width and --height"),
        (["extend", "absent.mp4"], "there is no file absent.mp4; give the path of a video or an image"),
        (["extend", "http://localhost/a.mp4"], "on this machine, not a URL"),
        (["extend", "list.txt"], "cannot read list.txt"),
        (["extend", "plain.png", "--seconds", "0"], "--seconds must be above 0"),
        (["extend", "plain.png", "--context", "0"], "--context"),
        (["extend", "plain.png", "--context", "33"], "context must be from 1 to 32 frames, is 33"),
        (["loop", "plain.png", "--seconds", "60"], "1440 frames from one clip to the next are over the 63"),
        (["edit", "plain.png", "x", "--strength", "1.5"], "strength must be from 0 to 1, is 1.5"),
        (["edit", "plain.png"], "Missing argument"),
        (["edit", "plain.png", "x", "--width", "-16", "--height", "-16"], "width -16 is not a positive multiple of 16"),
        (["edit", "plain.png", "x", "--width", "16", "--height", "100000000000"], "use at most 16x65536"),
        (["edit", "list.txt", "x", "--width", "1000000", "--height", "1000000"], "use at most 1024x1024"),
        (["edit", "plain.png", "x", "--width", "2048", "--height", "1024"], "2048x1024 with 1 frame is 8192 tokens"),
        (["inpaint", "plain.png", "x", "--mask", "plain.png"], "is nowhere white"),
        (["inpaint", "plain.png", "x", "--mask", "list.txt"], "cannot read list.txt"),
        (["blend", "plain.png", "plain.png", "--by", "magic"], "--by must be inversion or latents, is 'magic'"),
        (["blend", "plain.png", "plain.png", "--weight", "2"], "--weight"),
        (
            ["blend", "plain.png", "plain.png", "--sampler", "unipc"],
            "by euler, without guidance, at strength 1, not with",
        ),
        (["blend", "plain.png", "plain.png", "--guidance", "3"], "not with guidance 3.0; leave it out"),
        (["blend", "plain.png", "plain.png", "--strength", "0.6"], "not with strength 0.6; leave it out"),
        (["inspect", "plain.png"], "plain.png does not say how it was made"),
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
        (["export", "absent", "-o", "b"], "absent does not exist; give the folder that was downloaded"),
        (["export", "plain.png", "-o", "b"], "plain.png is a file; give the folder that was downloaded"),
        (
            ["export", "empty", "-o", "b"],
            "empty is not a checkpoint: it has no model_index.json as diffusers' folders, no config.json beside shards "
            "as the original releases, and no spec.json as tubelet's own",
        ),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(tubelet, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("a red circle\n" + "red " * 40)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a red circle\n")
    (tmp_path / "late.txt").write_text("1: a red circle\n")
    (tmp_path / "minutes.txt").write_text("0: a red circle\n1:30: a red circle\n")
    (tmp_path / "folder.mp4").mkdir()
    with VideoWriter(tmp_path / "plain.png", 32, 32, 24) as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.uint8))
    before = sorted(tmp_path.iterdir())

    result = tubelet(*arguments)

    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err and "prompt:" not in result.err
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


def test_a_second_signal_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    """Both come while rich draws: what one interrupts, the other must not find half done."""
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs have it ignored
from tubelet.runtime.cli import app, main

@app.app.command()
def slow():
    with app.err.status("busy"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            print("cleaned up")

main()
"""
    result = subprocess.run([sys.executable, "-c", code, "slow"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "cleaned up\n")
    assert result.stderr == "interrupted: nothing unfinished is kept\n"


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
