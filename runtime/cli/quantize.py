"""`tubelet quantize`: a bundle whose denoiser multiplies in 8 or 4 bits, and what that does to its clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle
from ..errors import UserError
from ..precision import read_precision
from .app import app, err, out
from .precision import precision_tables

# Plain sentences, in words that the embedded model knows too.
PROMPTS = (
    "a red circle moves right on a white background",
    "a blue square grows on a black background",
    "on a gray background a yellow triangle slides to the left",
    "a circle that is green falls down over cyan",
    "a video of a purple square on white , it rests",
    "an orange triangle shrinks on a gray background",
    "on a black background a red square rises up",
    "a triangle that is blue gets bigger over cyan",
)


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, which stays as it is.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to make.")],
    precision: Annotated[str, typer.Option(help="int8, fp8, nvfp4, or w8: 8-bit weights alone.")],
    keep: Annotated[
        list[str] | None, typer.Option(help="Leave layers as they are, such as 'blocks.0.*'; may be repeated.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Most relative error of the final latents; widens layers until it is met.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts to calibrate on, one a line; plain scenes if not given.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy weights that stay as they are, instead of linking the files.")
    ] = False,
) -> None:
    """Round a bundle's denoiser to 8 or 4 bits and measure the damage (needs the extras `build` and `cpu`)."""
    try:
        from tubelet.export.quantize import Plan  # noqa: TID251 needs no torch
        from tubelet.export.quantize import quantize as make  # noqa: TID251
    except ImportError as error:
        raise UserError(
            f"quantizing needs a package that is missing ({error}); install the extras build, cpu"
        ) from error
    plan = Plan(precision, PROMPTS if prompts is None else _lines(prompts), tuple(keep or ()), budget)
    with err.status("") as status:
        made = make(Bundle.open(bundle), output, plan, copy, status.update)
    told = read_precision(made)
    assert told is not None
    out.print(*precision_tables(told))
    out.print(f"wrote {output}: key {made.key[:16]}", markup=False)


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file of prompts, one a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; give a text file of prompts, one a line") from error
    return tuple(line.strip() for line in lines if line.strip())
