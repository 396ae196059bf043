"""`tubelet profiles`: from traffic to the profiles that a model is best compiled for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..bundle import EMBEDDED, Bundle
from ..geometry import Geometry
from ..profiles import Profile, Range
from ..spec import ModelSpec
from .app import app, out

if TYPE_CHECKING:
    from tubelet.export.profiles import Choice, Outside  # noqa: TID251 loaded by the command alone


@app.command()
def profiles(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, the embedded model if not given.")] = EMBEDDED,
    *,
    traffic: Annotated[Path, typer.Option(help="TOML file of shapes and their shares: see docs/compile.md.")],
    max_profiles: Annotated[int, typer.Option(min=1, help="Most profiles of one engine.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Choose the profiles that serve a traffic at the least cost, and say why. Exits with 1 if some falls outside."""
    from tubelet.export.profiles import choose  # noqa: TID251 needs no torch
    from tubelet.export.traffic import read_traffic  # noqa: TID251

    spec = Bundle.open(bundle).spec
    choice = choose(spec, read_traffic(traffic, spec), max_profiles)
    report = _report(spec, choice)
    if as_json:
        out.print_json(data=report)
    else:
        _print(choice, report)
    if choice.outside:
        raise typer.Exit(1)


def _print(choice: Choice, report: dict[str, Any]) -> None:
    shapes = Table("share", "size", "frames", "N", "profile", title="Traffic")
    for served in choice.served:
        shape = served.shape
        shapes.add_row(
            *(f"{shape.share:.1%}", f"{shape.width}x{shape.height}", str(shape.frames)),
            *(str(served.geometry.tokens), str(choice.profile_of(served))),
        )
    denoiser = Table("profile", "N min", "opt", "max", "B min", "opt", "max", "share", title="The denoiser's profiles")
    for index, profile in enumerate(choice.profiles["denoiser"]):
        share = sum(served.shape.share for served in choice.served if choice.profile_of(served) == index)
        bounds = (str(bound) for name in ("N", "B") for bound in vars(profile[name]).values())
        denoiser.add_row(str(index), *bounds, f"{share:.1%}")
    components = Table(
        "component", "profiles: min..opt..max", "plan grows by", "build grows by", title="All components"
    )
    for row in report["components"]:
        extents = "\n".join(map(describe, choice.profiles[row["component"]]))
        components.add_row(row["component"], extents, decimal(row["plan_growth"]), f"{row['build_seconds']:.0f} s")
    out.print(shapes, denoiser, components)
    print_outside(choice.outside)
    out.print(
        f"expected cost of a step: {report['cost']['to_one_profile']:.3f} of what one profile costs, "
        f"{report['cost']['to_one_for_each_n']:.3f} of one profile for each N"
    )


def print_outside(outside: tuple[Outside, ...], label: str = "outside", to: Console = out) -> None:
    """One line for each shape of the traffic that is not served."""
    for each in outside:
        shape = each.shape
        to.print(
            f"{label}: {shape.width}x{shape.height} with {shape.frames} frames, {shape.share:.1%}: {each.reason}. "
            f"The nearest shape inside is {_named(each.nearest)}",
            markup=False,
        )


def describe(profile: Profile) -> str:
    """Every extent as min..opt..max, or one number."""
    return ", ".join(f"{name} {_bounds(values)}" for name, values in profile.items())


def _bounds(values: Range) -> str:
    return str(values.opt) if values.min == values.max else f"{values.min}..{values.opt}..{values.max}"


def _named(geometry: Geometry) -> str:
    return f"{geometry.width}x{geometry.height} with {geometry.frames} frames"


def _report(spec: ModelSpec, choice: Choice) -> dict[str, Any]:
    """What `--json` prints."""
    from tubelet.export.estimate import build_seconds, plan_growth  # noqa: TID251

    return {
        "traffic": [
            {**vars(served.shape), "tokens": served.geometry.tokens, "profile": choice.profile_of(served)}
            for served in choice.served
        ],
        "outside": [
            {**vars(each.shape), "reason": each.reason, "nearest": dataclasses.asdict(each.nearest)}
            for each in choice.outside
        ],
        "components": [
            {
                "component": component,
                "profiles": [{name: vars(values) for name, values in profile.items()} for profile in chosen],
                "plan_growth": plan_growth(spec, component, len(chosen)),
                "build_seconds": build_seconds(spec, component, len(chosen)),
            }
            for component, chosen in choice.profiles.items()
        ],
        "cost": {
            "to_one_profile": choice.cost / choice.cost_of_one,
            "to_one_for_each_n": choice.cost / choice.cost_of_all,
        },
    }
