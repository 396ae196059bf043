"""`tubelet caption`: a folder of clips to a file of captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from ..caption import MAX_BEAMS
from ..chat import caption_messages, complete, tidy
from ..errors import UserError
from ..geometry import nearest_size
from ..media import read_clip
from ..studio import Studio
from .app import command, err, out
from .options import Chat, Run
from .output import check_writable

SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"),
    *(".gif", ".apng", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
}
CHAT_SIZE = 512  # pixels of the longer side that a language model is shown
CHAT_FPS = 4

Frames = Any


@command
def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of videos and images, searched with all its folders.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File that gets one JSON line a clip.")] = Path(
        "captions.jsonl"
    ),
    beams: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_BEAMS, help="Captions that the captioner's search keeps; 1, the default, is greedy."
        ),
    ] = None,
    chat: Chat,
    run: Run,
) -> None:
    """Say what clips show, by the model's captioner or by a language model that sees. Goes on where it stopped."""
    files = _files(folder)
    check_writable(output)
    done = _resume(output)
    left = [file for file in files if str(file.relative_to(folder)) not in done]
    read, tell = _eyes(chat, run, beams)
    written, skipped = 0, []
    for file in track(left, "caption", console=err, transient=True):
        name = str(file.relative_to(folder))
        try:
            frames = read(file)
        except UserError as error:
            skipped.append({"file": name, "error": str(error)})
            err.print(f"skipped {error}", markup=False)
            continue
        line = json.dumps({"file": name, "frames": len(frames), "caption": tell(frames)}, ensure_ascii=False)
        with output.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
        written += 1
    if run.as_json:
        out.print_json(data={"output": str(output), "written": written, "kept": len(done), "skipped": skipped})
        return
    out.print(f"wrote {output}: {written} captions, {len(done)} were there, {len(skipped)} clips skipped", markup=False)


def _files(folder: Path) -> list[Path]:
    """Every video and image under a folder, in order of their names."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds videos or images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no video or image ({', '.join(sorted(SUFFIXES))})")
    return files


def _resume(output: Path) -> set[str]:
    """The files that an earlier run captioned; a last line that was cut off is taken away."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        done = {json.loads(line)["file"] for line in whole.decode().splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} is not a file of captions ({error}); give another name with -o") from error
    if len(whole) < len(data):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _eyes(chat: Chat, run: Run, beams: int | None) -> tuple[Callable[[Path], Frames], Callable[[Frames], str]]:
    """What reads a clip, and what says what it shows."""
    endpoint = chat.endpoint()
    if endpoint is not None:
        if beams is not None:
            raise UserError(f"--beams {beams} is for the model's captioner; leave it out with --chat-url")
        return (
            lambda file: read_clip(file, CHAT_FPS, _smaller),
            lambda frames: tidy(complete(endpoint, caption_messages(frames))),
        )

    studio = Studio(run.open())
    spec = studio.spec
    return (
        lambda file: read_clip(file, spec.fps, lambda size: nearest_size(spec, *size)),
        lambda frames: studio.describe(frames, beams or 1),
    )


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, CHAT_SIZE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
