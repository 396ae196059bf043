"""The command line: `tubelet generate | inspect | export | doctor`.

The only module that reads flags, prints, and turns errors into exit codes: 2 for what the user can mend, 128 + n for
signal n. Commands that need torch load `tubelet.export` when they are typed.
"""

from __future__ import annotations

import dataclasses
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

BundleOption = Annotated[Path, typer.Option("--bundle", help="Bundle folder; the embedded model if not given.")]


def main() -> None:
    """Entry point: runs a command; a usage error exits with 2 by typer's own hand, a UserError by ours."""
    for number in (signal.SIGINT, signal.SIGTERM):
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
        float | None, typer.Option(help="Classifier-free guidance; 1 is off and twice as fast.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler or unipc.")] = None,
    shift: Annotated[float | None, typer.Option(help="Moves noise levels towards noise.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same video.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Clips a prompt, with seeds SEED, SEED+1, ...")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet PNG of all clips.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Make a video from a prompt."""
    from .geometry import frames_for
    from .request import Request

    spec = Bundle.open(bundle).spec
    if seconds is not None and frames is not None:
        raise UserError("--seconds and --frames exclude each other; give one")
    rate = float(spec.fps) if fps is None else fps
    if not 0 < rate <= 1000:
        raise UserError(f"--fps must be above 0 and at most 1000, is {rate:g}")
    if seconds is not None:
        if not 0 < seconds <= 86400:
            raise UserError(f"--seconds must be above 0 and at most 86400, is {seconds:g}")
        frames = frames_for(spec, seconds, rate)
    request = Request("", negative_prompt, width, height, frames, steps, guidance, sampler, shift, seed)
    texts = _read_prompts(prompt, prompts)
    requests = [dataclasses.replace(request, prompt=t, seed=seed + k) for t in texts for k in range(count)]
    paths = _numbered(output, len(requests))
    if sheet is not None and sheet.suffix != ".png":
        raise UserError(f"--sheet writes a PNG; name it {sheet.with_suffix('.png')} instead of {sheet}")
    made = _generate_all(bundle, requests, paths, rate, threads, sheet)
    if as_json:
        out.print_json(data={"clips": made})
        return
    for clip in made:
        stages = ", ".join(f"{name} {value:.2f} s" for name, value in clip["seconds"].items())
        out.print(
            f"wrote {clip['path']}: {clip['frames']} frames of {clip['width']}x{clip['height']}, "
            f"{clip['frames'] / rate:.2f} s at {rate:g} fps, seed {clip['seed']} ({stages})",
            markup=False,
        )


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise UserError("give either a PROMPT or --prompts FILE")
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{file} holds no prompt; write one a line")
    return texts


def _numbered(path: Path, count: int) -> list[Path]:
    """out.mp4 for one clip; out-1.mp4, out-2.mp4, ... for several."""
    digits = len(str(count))
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, count + 1)]


def _generate_all(
    bundle: Path, requests: list[Request], paths: list[Path], rate: float, threads: int | None, sheet: Path | None
) -> list[dict[str, Any]]:
    """Makes every clip and returns what the last lines say of each."""
    from .pipeline import Pipeline

    clock = Clock()
    with clock("load"):
        pipeline = Pipeline.open(bundle, threads)
    made, rows = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        for number, (request, path) in enumerate(zip(requests, paths, strict=True), start=1):
            label = f"[{number}/{len(requests)}] " if len(requests) > 1 else ""
            with clock("text"):
                generation = pipeline.prepare(request)
            frames = _write_clip(pipeline, generation, path, rate, clock, progress, label)
            if sheet is not None:
                rows.append((frames, f"{request.prompt} (seed {request.seed})"))
            settings = dataclasses.asdict(generation.settings)
            made.append({"path": str(path), **settings, "fps": rate, "seconds": clock.take()})
    if sheet is not None:
        _write_sheet(sheet, rows)
    return made


def _write_clip(
    pipeline: Pipeline, generation: Generation, path: Path, rate: float, clock: Clock, progress: Progress, label: str
) -> list[Frames]:
    """Denoises, decodes and writes one clip; returns a few of its frames. An unwritable path fails before any work."""
    from .video import VideoWriter, check_length

    size = generation.geometry
    check_length(path, size.frames)
    task = progress.add_task(f"{label}denoise", total=generation.schedule.steps)
    kept: list[Frames] = []
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
            kept.append(chunk[-1:])
            progress.advance(task, len(chunk))
        with clock("write"):
            writer.close()
    progress.remove_task(task)
    return kept


def _write_sheet(path: Path, rows: list[tuple[list[Frames], str]]) -> None:
    import numpy as np

    from .sheet import contact_sheet
    from .video import VideoWriter

    image = contact_sheet([np.concatenate(frames) for frames, _ in rows], [label for _, label in rows])
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
        out.print_json(data=opened.to_json())
        return
    spec = opened.spec
    out.print(f"{spec.name}  key {opened.key[:16]}  targets {', '.join(opened.targets)}", markup=False)
    defaults = ", ".join(f"{name} {value!r}" for name, value in vars(spec.defaults).items())
    out.print(f"{spec.fps} fps, at most {spec.max_tokens} tokens; defaults: {defaults}", markup=False)
    components = Table("component", "parameters", "inputs", "outputs", title="Components")
    for name, component in opened.components.items():
        components.add_row(name, f"{component.parameters:,}", _ports(component.inputs), _ports(component.outputs))
    files = Table("file", "bytes", "sha256", title="Files")
    for name, record in opened.files.items():
        files.add_row(name, f"{record.bytes:,}", record.sha256[:16])
    parity = Table("component", "target", "shape", "max |difference|", "relative", title="Parity against torch")
    for row in opened.parity:
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
        raise UserError(f"exporting needs {error.name}; run pip install 'tubelet[export,cpu]'") from error
    with err.status("") as status:
        made = build(checkpoint, output, status.update)
    out.print(f"wrote {output}: {len(made.components)} components, key {made.key[:16]}", markup=False)


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
