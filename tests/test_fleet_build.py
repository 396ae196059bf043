"""Building and checking a fleet, on real plans: what is left is told, and no damage passes the check.

pytest tests/test_fleet_build.py
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiled import MAX_PROFILES, TARGET, TRAFFIC

from tubelet.export import fleet_build
from tubelet.export.errors import CompilerError
from tubelet.export.fleet import FleetPlan, plan_fleet
from tubelet.export.fleet_build import build_fleet, orders
from tubelet.export.fleet_check import check_fleet
from tubelet.runtime import Bundle
from tubelet.runtime.plans import Target, plan_key, plan_path, read_record, write_record
from tubelet.runtime.residency import KEPT, PARTS, RESERVED, footprint

SKU = "[[sku]]\nname = '{}'\narchitecture = '{}'\nmemory_gb = {}\ncount = 2\nprecision = '{}'\n"
SERVED = "".join(SKU.format(f"card-{name}", name, 16, "fp16") for name in TARGET.architectures)
H100 = SKU.format("H100", "sm90", 80, "fp16") + "gpu = 'NVIDIA H100 80GB HBM3'\n"
H200 = SKU.format("H200", "sm90", 141, "fp16") + "gpu = 'NVIDIA H200'\n"
ON_H100, ON_H200 = (Target("tensorrt", ("sm90",), "fp16", gpu) for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))


@pytest.fixture
def folder(compiled_copy: Bundle) -> Path:
    """A folder to serve a fleet from: a bundle with plans, traffic; `fleet` adds fleet.toml."""
    (compiled_copy.folder.parent / "traffic.toml").write_text(TRAFFIC)
    return compiled_copy.folder.parent


def fleet(folder: Path, skus: str) -> FleetPlan:
    head = f"traffic = 'traffic.toml'\nmodels = ['compiled']\nmax_profiles = {MAX_PROFILES}\n"
    (folder / "fleet.toml").write_text(head + skus)
    return plan_fleet(folder / "fleet.toml")


def plan_of(planned: FleetPlan, component: str, target: Target = TARGET) -> Path:
    return plan_path(planned.bundles["compiled"], target, component)


def as_built_elsewhere(planned: FleetPlan, target: Target) -> None:
    """Records as another machine's compiler would leave them; what is in a plan of TensorRT cannot be told here."""
    bundle = planned.bundles["compiled"]
    for order in orders(planned):
        for component, profiles in order.profiles.items() if order.target == target else ():
            source, plan = plan_of(planned, component), plan_of(planned, component, target)
            plan.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, plan)
            known = read_record(source)
            key = plan_key(bundle, component, target, known.compiler, profiles, known.budget)
            write_record(plan, dataclasses.replace(known, key=key, target=target))


def test_a_served_fleet_has_nothing_left_and_no_hole(folder: Path) -> None:
    planned = fleet(folder, SERVED)
    kept = []
    assert build_fleet(planned, 2, on_built=lambda record, was_kept: kept.append(was_kept)) == []
    assert kept == [True] * len(planned.builds)
    assert check_fleet(planned) == []


def test_what_is_missing_is_built_here(folder: Path) -> None:
    planned = fleet(folder, SERVED)
    plan_of(planned, "text_encoder").unlink()
    (hole,) = check_fleet(planned)
    assert (hole.component, hole.skus) == ("text_encoder", tuple(sku.name for sku in planned.fleet.sku))

    built = []
    assert (
        build_fleet(planned, 2, on_built=lambda record, kept: built.append(record.component) if not kept else None)
        == []
    )
    assert built == ["text_encoder"] and check_fleet(planned) == []


def test_other_machines_get_a_shell_line_until_their_plans_are_there(folder: Path) -> None:
    planned = fleet(folder, SERVED + H100)
    (rest,) = build_fleet(planned, 2)
    line = "tubelet build compiled --target tensorrt:sm90 --precision fp16 --memory 80 --traffic traffic.toml"
    line += " --max-profiles 1"
    assert rest.command == f"{line}  # on NVIDIA H100 80GB HBM3"
    assert {hole.skus for hole in check_fleet(planned)} == {("H100",)}

    as_built_elsewhere(planned, ON_H100)
    assert build_fleet(planned, 2) == [] and check_fleet(planned) == []

    plan_of(planned, "denoiser", ON_H100).unlink()
    (rest,) = build_fleet(planned, 2)
    assert rest.command == f"{line} --component denoiser  # on NVIDIA H100 80GB HBM3"


def test_gpus_of_one_architecture_have_plans_of_their_own(folder: Path) -> None:
    planned = fleet(folder, SERVED + H100 + H200)
    as_built_elsewhere(planned, ON_H100)
    (rest,) = build_fleet(planned, 2)
    assert rest.order.target == ON_H200 and {hole.skus for hole in check_fleet(planned)} == {("H200",)}


def test_gpus_of_one_name_share_their_plans(folder: Path) -> None:
    planned = fleet(folder, SERVED + H100 + H100.replace("'H100'", "'H100-spot'").replace("80\n", "40\n"))
    (rest,) = build_fleet(planned, 2)
    assert rest.command is not None and " --memory 40 " in rest.command
    assert {hole.skus for hole in check_fleet(planned)} == {("H100", "H100-spot")}


def test_plans_of_two_releases_are_a_hole(folder: Path) -> None:
    planned = fleet(folder, SERVED)
    plan = plan_of(planned, "denoiser")
    known = read_record(plan)
    older = dataclasses.replace(known.compiler, version="1.0")
    key = plan_key(planned.bundles["compiled"], "denoiser", TARGET, older, known.profiles, known.budget)
    write_record(plan, dataclasses.replace(known, compiler=older, key=key))

    holes = check_fleet(planned)
    assert [hole.skus for hole in holes] == [(sku.name,) for sku in planned.fleet.sku]
    reason = f"its plans are of tensorrt_rtx 1.0, tensorrt_rtx {known.compiler.version}; build all with one release"
    assert {hole.reason for hole in holes} == {reason}


def test_a_plan_of_another_budget_serves_if_it_fits(folder: Path) -> None:
    """What counts is the memory that was measured."""
    planned = fleet(folder, SERVED.replace("memory_gb = 16", "memory_gb = 24"))
    assert check_fleet(planned) == []


def test_a_precision_that_the_bundle_was_not_made_for_is_a_hole(folder: Path) -> None:
    planned = fleet(folder, SERVED + H200.replace("fp16", "fp8"))
    as_built_elsewhere(planned, dataclasses.replace(ON_H200, precision="bf16"))
    (rest,) = build_fleet(planned, 2)
    assert "compiled is not quantized; make a bundle with `tubelet quantize" in rest.reason and rest.command is None
    assert tuple(rest.order.profiles) == ("denoiser",)
    assert [(hole.component, hole.skus) for hole in check_fleet(planned)] == [("denoiser", ("H200",))]


def test_what_the_compiler_refuses_is_left_and_the_others_are_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = fleet(folder, SERVED + SKU.format("A100", "sm80", 80, "bf16"))
    plan_of(planned, "denoiser").unlink()
    asked = []

    def build(bundle: Bundle, target: Target, *rest: object) -> None:
        asked.append(target)
        if target.precision == "fp16":
            raise CompilerError("denoiser: no")

    monkeypatch.setattr(fleet_build, "build_engines", build)
    (rest,) = build_fleet(planned, 2)
    assert asked == [TARGET, Target("rtx", ("sm80",), "bf16")]
    assert (rest.order.target, rest.reason, rest.command) == (TARGET, "denoiser: no", None)
    assert tuple(rest.order.profiles) == ("denoiser",)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: plan.unlink(), "cannot read .*: No such file or directory; build the target again"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "is damaged: it is not what its record says"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1] + b"?"), "is damaged: it is not what its record says"),
        (lambda plan: plan.with_suffix(".json").unlink(), "is missing; build the target"),
        (lambda plan: plan.with_suffix(".json").write_text("[]"), "is not usable: plan must be an object"),
        (
            lambda plan: write_record(plan, dataclasses.replace(read_record(plan), key="0")),
            "was built from other weights or for other profiles; build the target again",
        ),
    ],
)
def test_no_damage_passes_the_check(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    planned = fleet(folder, SERVED)
    damage(plan_of(planned, "vae_decoder"))
    (hole,) = check_fleet(planned)
    assert hole.component == "vae_decoder" and re.search(reason, hole.reason)


def test_other_traffic_is_a_hole(folder: Path) -> None:
    (folder / "traffic.toml").write_text(TRAFFIC.replace("frames = 9", "frames = 33"))
    holes = check_fleet(fleet(folder, SERVED))
    assert {hole.component for hole in holes} == {"denoiser", "captioner_memory", "captioner"}


def test_what_does_not_fit_by_measure_is_a_hole(folder: Path) -> None:
    """As the runtime finds before it loads them: by parts, one at a time."""
    planned = fleet(folder, SERVED)
    bundle = planned.bundles["compiled"]
    components = bundle.manifest.components
    takes = {name: footprint(components[name], read_record(plan_of(planned, name))) for name in components}
    kept = [name for name in components if name.startswith(KEPT)]
    parts = [[name for name in part if name in components] for part in PARTS.values()]
    needs = RESERVED + max(
        sum(takes[name].weights for name in part)
        + sum(takes[name].buffers for name in {*part, *kept})
        + max(takes[name].scratch for name in part)
        for part in parts
        if part
    )

    (hole,) = check_fleet(fleet(folder, SERVED + SKU.format("small", "sm86", (needs - 1) / 10**9, "fp16")))
    assert (hole.component, hole.skus) == (None, ("small",))
    assert re.match(r"the [\w ]+ alone needs .* GiB, small has .* GiB to spare; ", hole.reason)
    assert not check_fleet(fleet(folder, SERVED + SKU.format("small", "sm86", needs / 10**9, "fp16")))


def test_the_commands_tell_scripts_by_their_exit_codes(tubelet: Callable[..., Any], folder: Path) -> None:
    fleet(folder, SERVED)
    assert tubelet("fleet", "build", "fleet.toml").code == 0
    checked = tubelet("fleet", "check", ".")
    assert checked.code == 0 and "9 plans serve all 54 cells" in checked.out

    fleet(folder, SERVED + H100)
    built = tubelet("fleet", "build", ".")
    assert built.code == 1
    assert built.out.startswith("tubelet build compiled --target tensorrt:sm90") and built.out.count("\n") == 1
    assert f"not built: compiled {ON_H100.name} text_encoder, " in built.err
    checked = tubelet("fleet", "check", "fleet.toml")
    assert checked.code == 1 and checked.out.count(" on H100: ") == 9

    assert tubelet("fleet", "build", "absent.toml").code == tubelet("fleet", "check", "absent").code == 2


def test_traffic_outside_fails_the_check(tubelet: Callable[..., Any], folder: Path) -> None:
    (folder / "traffic.toml").write_text(TRAFFIC + TRAFFIC.replace("width = 64", "width = 65"))
    fleet(folder, SERVED)
    checked = tubelet("fleet", "check", ".")
    assert checked.code == 1 and "outside compiled: 65x64 with 9 frames" in checked.out
    built = tubelet("fleet", "build", ".")
    assert built.code == 1 and built.out == "" and "outside compiled: 65x64 with 9 frames" in built.err
