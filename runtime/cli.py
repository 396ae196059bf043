"""The command line: `tubelet generate | inspect | export | doctor`.

The only module that reads flags, prints, and turns errors into exit codes: 2 for what the user can mend, 128 + n for
signal n. Commands that need torch load `tubelet.export` when they are typed.
"""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .bundle import EMBEDDED, Bundle
from .errors import UserError

if TYPE_CHECKING:
    from .pipeline import Frames, Generation, Pipeline
    from .request import Request

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)

MAX_CLIPS = 10_000
MIN_FPS, MAX_FPS = 0.01, 1000.0
BundleOption = Annotated[Path, typer.Option("--bundle", help="Bundle folder; the embedded model if not given.")]


def main() -> None:
    """Entry point: runs a command; a usage error exits with 2 by typer's own hand, a UserError by ours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        app()
    except UserError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)


def _stop(number: int, frame: object) -> NoReturn:
    """Unwinds the stack, so that writers remove their temporary files."""
    err.print("interrupted: nothing unfinished is kept")
    sys.exit(128 + number)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .mp4, .webp, .gif, or .png.")] = Path(
        "out.mp4"
    ),
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, instead of PROMPT.")] = None,
    bundle: BundleOption = EMBEDDED,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 1 + 4k for the embedded model.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Duration, instead of --frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file; the model's if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is off and halves the work.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler or unipc.")] = None,
    shift: Annotated[float | None, typer.Option(help="Moves noise levels towards noise.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same video.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Clips a prompt, with seeds SEED, SEED+1, ...")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the engines; all cores if not given.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet PNG of all clips.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Make a video from a prompt."""
    from .geometry import frames_for
    from .pipeline import Pipeline
    from .request import Request

    if seconds is not None and frames is not None:
        raise UserError("--seconds and --frames exclude each other; give one")
    texts = _read_prompts(prompt, prompts)
    paths = _output_paths(output, len(texts) * count, sheet)
    clock = Clock()
    with clock("load"):
        pipeline = Pipeline.open(bundle, threads)
    rate = float(pipeline.spec.fps) if fps is None else fps
    if not MIN_FPS <= rate <= MAX_FPS:
        raise UserError(f"--fps must be from {MIN_FPS:g} to {MAX_FPS:g}, is {rate:g}")
    if seconds is not None:
        if not 0 < seconds <= 86400:
            raise UserError(f"--seconds must be above 0 and at most 86400, is {seconds:g}")
        frames = frames_for(pipeline.spec, seconds, rate)
    request = Request("", negative_prompt, width, height, frames, steps, guidance, sampler, shift, seed)
    requests = [dataclasses.replace(request, prompt=t, seed=seed + k) for t in texts for k in range(count)]
    made = _generate_all(pipeline, requests, paths, rate, clock, sheet)
    if as_json:
        out.print_json(data={"clips": made, "sheet": str(sheet) if sheet else None})
        return
    for clip in made:
        stages = ", ".join(f"{name} {value:.2f} s" for name, value in clip["seconds"].items())
        out.print(
            f"wrote {clip['path']}: {clip['frames']} frames of {clip['width']}x{clip['height']}, "
            f"{clip['frames'] / rate:.2f} s at {rate:g} fps, seed {clip['seed']} ({stages})",
            markup=False,
        )
    if sheet:
        out.print(f"wrote {sheet}: {len(made)} rows", markup=False)


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise UserError("give either a PROMPT or --prompts FILE")
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{file} holds no prompt; write one a line")
    return texts


def _output_paths(path: Path, count: int, sheet: Path | None) -> list[Path]:
    """out.mp4 for one clip; out-1.mp4, out-2.mp4, ... for several. Raises UserError for one that cannot be written."""
    from .sheet import MAX_ROWS
    from .video import codec_for

    codec_for(path)
    if count > MAX_CLIPS:
        raise UserError(
            f"{count} clips are more than the {MAX_CLIPS} of one command; give fewer prompts or a lower --count"
        )
    digits = len(str(count))
    paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, count + 1)]
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet writes a PNG, so its name must end in .png, is {str(sheet)!r}")
        if sheet in paths:
            raise UserError(f"--sheet {sheet} is also the name of a clip; choose another")
        if count > MAX_ROWS:
            raise UserError(
                f"--sheet holds up to {MAX_ROWS} clips, these are {count}; leave it out or make fewer clips"
            )
    for target in paths + ([sheet] if sheet else []):
        _check_writable(target)
    return paths


def _check_writable(path: Path) -> None:
    try:
        if path.exists() and path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give a file name inside it")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another name") from error
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"cannot write {path}: {path.parent} is not a writable folder; create it or choose another")


def _generate_all(
    pipeline: Pipeline, requests: list[Request], paths: list[Path], rate: float, clock: Clock, sheet: Path | None
) -> list[dict[str, Any]]:
    """Makes every clip and returns what the last lines say of each. A request that cannot be served fails first."""
    from .sheet import sheet_size
    from .video import MAX_SIZE, check_length

    sizes = [pipeline.check(request)[1] for request in requests]
    for size, path in zip(sizes, paths, strict=True):
        check_length(path, size.frames)
    if sheet is not None:
        width, height = sheet_size([(size.frames, size.height, size.width) for size in sizes])
        if max(width, height) > MAX_SIZE:
            raise UserError(
                f"--sheet would be {width}x{height} pixels, over {MAX_SIZE} a side; "
                f"leave it out or make fewer or smaller clips"
            )
    made, rows = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        for number, (request, path) in enumerate(zip(requests, paths, strict=True), start=1):
            label = f"[{number}/{len(requests)}] " if len(requests) > 1 else ""
            with clock("text"):
                generation = pipeline.prepare(request)
            thumbnails = Thumbnails(generation.geometry.frames) if sheet else None
            _write_clip(pipeline, generation, path, rate, clock, progress, label, thumbnails)
            if thumbnails is not None:
                rows.append((thumbnails, f"{request.prompt} (seed {request.seed})"))
            settings = dataclasses.asdict(generation.settings)
            made.append({"path": str(path), **settings, "fps": rate, "seconds": clock.take()})
    if sheet is not None:
        _write_sheet(sheet, rows)
    return made


def _write_clip(
    pipeline: Pipeline,
    generation: Generation,
    path: Path,
    rate: float,
    clock: Clock,
    progress: Progress,
    label: str,
    thumbnails: Thumbnails | None,
) -> None:
    """Denoises, decodes and writes one clip."""
    from .video import VideoWriter

    size = generation.geometry
    task = progress.add_task(f"{label}denoise", total=generation.schedule.steps)
    with VideoWriter(path, size.width, size.height, rate) as writer:
        while not generation.finished:
            with clock("denoise"):
                pipeline.step(generation)
            progress.update(task, completed=generation.done)
        progress.update(task, description=f"{label}decode", completed=0, total=size.frames)
        chunks = pipeline.decode(generation)
        while True:
            with clock("decode"):
                chunk = next(chunks, None)
            if chunk is None:
                break
            with clock("write"):
                writer.write(chunk)
            if thumbnails is not None:
                thumbnails.add(chunk)
            progress.advance(task, len(chunk))
        with clock("write"):
            writer.close()
    progress.remove_task(task)


class Thumbnails:
    """Picks a contact sheet's frames out of a stream of chunks."""

    def __init__(self, frames: int):
        from .sheet import shown_frames

        self.wanted = set(shown_frames(frames))
        self.seen = 0
        self.kept: list[Frames] = []

    def add(self, chunk: Frames) -> None:
        self.kept += [chunk[i : i + 1].copy() for i in range(len(chunk)) if self.seen + i in self.wanted]
        self.seen += len(chunk)


def _write_sheet(path: Path, rows: list[tuple[Thumbnails, str]]) -> None:
    import numpy as np

    from .sheet import contact_sheet
    from .video import VideoWriter

    clips = [np.concatenate(thumbnails.kept) for thumbnails, _ in rows]
    image = contact_sheet(clips, [label for _, label in rows])
    with VideoWriter(path, image.shape[1], image.shape[0], 1) as writer:
        writer.write(image[None])


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """What was measured since the last take."""
        taken, self.seconds = self.seconds, {}
        return taken


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; the embedded model if not given.")] = EMBEDDED,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a bundle holds: components, shapes, parameters, targets, hashes, parity."""
    opened = Bundle.open(bundle)
    if as_json:
        out.print_json(data=dataclasses.asdict(opened.manifest))
        return
    spec, manifest = opened.spec, opened.manifest
    out.print(f"{spec.name}  key {opened.key[:16]}  targets {', '.join(manifest.targets)}", markup=False)
    defaults = ", ".join(f"{name} {value!r}" for name, value in vars(spec.defaults).items())
    out.print(f"{spec.fps} fps, at most {spec.max_tokens} tokens; defaults: {defaults}", markup=False)
    components = Table("component", "parameters", "inputs", "outputs", title="Components")
    for name, component in manifest.components.items():
        components.add_row(name, f"{component.parameters:,}", _ports(component.inputs), _ports(component.outputs))
    files = Table("file", "bytes", "sha256", title="Files")
    for name, record in manifest.files.items():
        files.add_row(name, f"{record.bytes:,}", record.sha256[:16])
    parity = Table("component", "target", "shape", "max |difference|", "relative", title="Parity against torch")
    for row in manifest.parity:
        parity.add_row(row.component, row.target, row.shape, f"{row.max_abs:.1e}", f"{row.relative:.1e}")
    out.print(components, files, parity)


def _ports(ports: Any) -> str:
    """Few ports one a line; the caches of a VAE only counted."""
    caches = [name for name in ports if "cache_" in name]
    lines = [f"{name} \\[{','.join(map(str, shape))}]" for name, shape in ports.items() if name not in caches]
    return "\n".join([*lines, f"{len(caches)} caches"] if caches else lines)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with spec.json, weights.safetensors, tokenizer.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to make.")],
) -> None:
    """Compile a checkpoint into a bundle (needs the extra `export`)."""
    try:
        from tubelet.export.build import build  # noqa: TID251 the one lazy exception
    except ImportError as error:
        raise UserError(
            f"exporting needs a package that is missing ({error}); install tubelet with its extras export and cpu"
        ) from error
    with err.status("") as status:
        made = build(checkpoint, output, status.update)
    worst = max(row.relative for row in made.manifest.parity)
    out.print(
        f"wrote {output}: {len(made.manifest.components)} components, key {made.key[:16]}, "
        f"at most {worst:.1e} from torch (relative)",
        markup=False,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what this machine can run, and why not where it cannot."""
    from .doctor import examine

    findings = examine()
    if as_json:
        out.print_json(data=[dataclasses.asdict(finding) for finding in findings])
        return
    table = Table("part", "works", "detail")
    for finding in findings:
        table.add_row(finding.part, "yes" if finding.works else "no", finding.detail)
    out.print(table)
