"""A fleet's plan: every cell once, plans shared where one can serve several machines, and what does not fit is told.

pytest tests/test_fleet.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tubelet.export.errors import CompilerError
from tubelet.export.estimate import activation_budget, footprint, plan_growth
from tubelet.export.fleet import FleetPlan, plan_fleet, read_fleet
from tubelet.export.precision import TYPES
from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape, read_traffic
from tubelet.runtime import EMBEDDED, Bundle, UserError, plans
from tubelet.runtime.residency import PARTS, RESERVED
from tubelet.runtime.spec import ModelSpec

TRAFFIC = "".join(f"[[shape]]\nwidth = 64\nheight = 64\nframes = {frames}\nshare = 1\n" for frames in (9, 33, 65))
FLEET = f"traffic = 'traffic.toml'\nmodels = ['{EMBEDDED}']\nmax_profiles = 2\n"
SKU = "[[sku]]\nname = '{}'\narchitecture = '{}'\nmemory_gb = {}\ncount = 2\nprecision = '{}'\n"
MIXED = (
    "".join(
        SKU.format(*sku)
        for sku in (
            ("T4", "sm75", 16, "fp16"),
            ("A100", "sm80", 80, "bf16"),
            ("L4", "sm89", 24, "fp8"),
            ("RTX-5090", "sm120", 32, "fp8"),
            ("H100", "sm90", 80, "fp8"),
            ("H200", "sm90", 141, "fp8"),
        )
    )
    .replace("'H100'", "'H100'\ngpu = 'NVIDIA H100 80GB HBM3'")
    .replace("'H200'", "'H200'\ngpu = 'NVIDIA H200'")
)
BUILDABLE = MIXED.replace("'fp8'", "'bf16'")


@pytest.fixture
def plan(tmp_path: Path) -> Callable[[str], FleetPlan]:
    """The plan of a fleet.toml with this text, beside a traffic file."""

    def write(text: str) -> FleetPlan:
        (tmp_path / "traffic.toml").write_text(TRAFFIC)
        (tmp_path / "fleet.toml").write_text(text)
        return plan_fleet(tmp_path / "fleet.toml")

    return write


def test_every_cell_is_there_once_and_has_one_plan(plan: Callable[[str], FleetPlan]) -> None:
    planned = plan(FLEET + BUILDABLE)
    components = Bundle.open(EMBEDDED).manifest.components

    for component, sku in itertools.product(components, planned.fleet.sku):
        (build,) = (b for b in planned.builds if b.component == component and sku.name in b.skus)
        cells = [c.profile for c in planned.cells if (c.component, c.sku) == (component, sku.name)]
        assert cells == list(range(len(build.profiles)))
        assert sku.architecture in build.target.architectures
    assert planned.complete and len({c.component for c in planned.cells}) == len(components)


def test_rtx_plans_are_shared_by_precision_and_tensorrt_plans_are_not(plan: Callable[[str], FleetPlan]) -> None:
    builds = plan(FLEET + MIXED).builds

    def of(component: str) -> set[tuple[Any, ...]]:
        return {(str(b.target), b.target.precision, b.target.gpu, b.skus) for b in builds if b.component == component}

    assert of("denoiser") == {
        ("rtx:sm75", "fp16", None, ("T4",)),
        ("rtx:sm80", "bf16", None, ("A100",)),
        ("rtx:sm89,sm120", "fp8", None, ("L4", "RTX-5090")),
        ("tensorrt:sm90", "fp8", "NVIDIA H100 80GB HBM3", ("H100",)),
        ("tensorrt:sm90", "fp8", "NVIDIA H200", ("H200",)),
    }
    assert of("vae_decoder") == {
        ("rtx:sm75", "fp16", None, ("T4",)),
        ("rtx:sm80,sm89,sm120", "bf16", None, ("A100", "L4", "RTX-5090")),
        ("tensorrt:sm90", "bf16", "NVIDIA H100 80GB HBM3", ("H100",)),
        ("tensorrt:sm90", "bf16", "NVIDIA H200", ("H200",)),
    }


def test_a_plan_is_its_weights_and_what_profiles_add(plan: Callable[[str], FleetPlan]) -> None:
    planned = plan(FLEET + SKU.format("B200", "sm100", 180, "nvfp4") + "gpu = 'NVIDIA B200'")
    bundle = Bundle.open(EMBEDDED)
    parameters = {name: component.parameters for name, component in bundle.manifest.components.items()}
    size = {build.component: build.plan_bytes for build in planned.builds}

    assert size["denoiser"] == parameters["denoiser"] * 9 // 16 + 2 * 6 * 1_500_000
    assert size["text_encoder"] == parameters["text_encoder"] * 2 + 2 * 1_500_000
    assert plan_growth(bundle.spec, "denoiser", 3) == 3 * plan_growth(bundle.spec, "denoiser", 1)
    assert planned.disk_bytes("B200") == sum(size.values())


def test_a_cell_is_what_an_engine_takes_and_loading_is_the_runtimes(plan: Callable[[str], FleetPlan]) -> None:
    planned = plan(FLEET + SKU.format("A100", "sm80", 80, "bf16") + SKU.format("small", "sm80", 0.55, "bf16"))
    bundle = Bundle.open(EMBEDDED)
    component = bundle.manifest.components["denoiser"]
    profiles = next(build.profiles for build in planned.builds if build.component == "denoiser")

    memory = [cell.memory_bytes for cell in planned.cells if (cell.component, cell.sku) == ("denoiser", "A100")]
    taken = [footprint(bundle.spec, "denoiser", component, [profile], "bf16") for profile in profiles]
    assert memory == [each.weights + each.buffers + each.scratch for each in taken]
    assert memory[0] < memory[1]
    large, small = planned.loading[str(EMBEDDED)]
    assert large.fits and large.sentence.endswith("all engines stay loaded")
    assert not small.fits and "alone needs" in small.sentence and not planned.complete


def test_a_budget_is_what_the_weights_of_a_part_leave() -> None:
    components = Bundle.open(EMBEDDED).manifest.components
    weights = sum(2 * components[name].parameters for name in PARTS["VAE"])
    assert activation_budget(components, "vae_decoder", "bf16", 16) == 16 * 10**9 - RESERVED - weights
    with pytest.raises(CompilerError, match=r"a GPU of 0\.5 GB cannot hold the VAE: its weights take 0\.0 GB"):
        activation_budget(components, "vae_decoder", "bf16", 0.5)


def test_activations_grow_with_every_shape() -> None:
    bundle = Bundle.open(EMBEDDED)
    small, large = (choose(bundle.spec, [Shape(side, side, 33, 1.0)], 1).profiles for side in (64, 128))
    for name, component in bundle.manifest.components.items():
        a, b, both = (
            footprint(bundle.spec, name, component, profiles, "bf16")
            for profiles in (small[name], large[name], [*small[name], *large[name]])
        )
        assert both == b, name
        if name not in ("text_encoder", "conditioner"):  # they see no picture
            assert 0 < a.buffers < b.buffers and 0 < a.scratch <= b.scratch, name


def test_the_command_prints_what_to_build_where(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(TRAFFIC)
    (tmp_path / "fleet.toml").write_text(FLEET + BUILDABLE)

    result = tubelet("fleet", "plan", ".")
    assert result.code == 0, result.err
    for text in ("T4", "H200", "plans to build on NVIDIA H200: 9", "plans to build here: 18"):
        assert text in result.out
    told = json.loads(tubelet("fleet", "plan", "fleet.toml", "--json").out)
    assert told["complete"] and len(told["builds"]) == 36 and told["cells"][0]["component"] == "text_encoder"


def test_the_command_exits_with_1_where_a_plan_cannot_be_built_yet(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(TRAFFIC)
    (tmp_path / "fleet.toml").write_text(FLEET + MIXED)

    result = tubelet("fleet", "plan", "fleet.toml")
    assert result.code == 1
    for text in ("plans to build nowhere yet, being fp8: 3", "plans to build on NVIDIA H200: 8"):
        assert text in result.out
    told = json.loads(tubelet("fleet", "plan", "fleet.toml", "--json").out)
    assert not told["complete"]
    assert {build["target"]["precision"] for build in told["builds"] if not build["can_be_built"]} == {"fp8"}


def test_what_can_be_built_is_what_graphs_are_lowered_to() -> None:
    assert set(plans.BUILDABLE) == set(TYPES)


def test_the_command_exits_with_1_where_a_model_does_not_fit(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(TRAFFIC)
    (tmp_path / "fleet.toml").write_text(FLEET + SKU.format("tiny", "sm89", 0.55, "bf16"))

    result = tubelet("fleet", "plan", "fleet.toml")
    assert result.code == 1
    assert f"{EMBEDDED} on tiny: the VAE alone needs 0.0 GiB, tiny has 0.0 GiB to spare; " in result.out
    told = tubelet("fleet", "plan", "fleet.toml", "--json")
    assert told.code == 1 and not json.loads(told.out)["complete"]


def test_the_command_exits_with_1_where_traffic_is_outside(tubelet: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "traffic.toml").write_text(TRAFFIC + TRAFFIC.replace("64", "65"))
    (tmp_path / "fleet.toml").write_text(FLEET + MIXED)

    result = tubelet("fleet", "plan", "fleet.toml")
    assert result.code == 1
    assert f"outside {EMBEDDED}: 65x65 with 9 frames, 16.7%: width 65" in result.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"fleet lacks \['max_profiles', 'models', 'sku', 'traffic'\]"),
        (FLEET, r"fleet lacks \['sku'\]"),
        (FLEET + "sku = []", "fleet's sku names must be one or more, each once; they are none"),
        (FLEET + MIXED + MIXED, "sku names must be one or more, each once; they are T4, A100"),
        (FLEET.replace(f"'{EMBEDDED}'", "") + MIXED, "fleet's models must be one or more, each once; they are none"),
        (FLEET.replace("= 2", "= 0") + MIXED, "fleet.max_profiles must be above 0, is 0"),
        (FLEET + SKU.format("V100", "sm70", 16, "fp16"), "sku.architecture must be one of sm75, .*, is 'sm70'"),
        (FLEET + SKU.format("L4", "sm89", 24, "fp4"), "sku.precision must be one of bf16, .*, is 'fp4'"),
        (FLEET + SKU.format("T4", "sm75", 16, "bf16"), "bf16 is not there on sm75; choose from fp16, int8"),
        (
            FLEET + SKU.format("H100", "sm90", 80, "bf16"),
            "sku.gpu is missing: plans for sm90 are for one GPU; name it as",
        ),
        (FLEET + SKU.format("L4", "sm89", -24, "fp8"), "sku.memory_gb must be above 0, is -24"),
        (FLEET + MIXED.replace("count = 2", "count = 0"), "sku.count must be above 0, is 0"),
        (FLEET + MIXED.replace("count", "number"), r"fleet.sku\[0\] lacks \['count'\] and has unknown \['number'\]"),
        (FLEET.replace("traffic.toml", "absent.toml") + MIXED, "cannot read .*absent.toml: No such file"),
        (FLEET.replace(str(EMBEDDED), "absent") + MIXED, "absent is not a bundle"),
    ],
)
def test_a_wrong_fleet_is_named(plan: Callable[[str], FleetPlan], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(text)


def test_mistakes_exit_with_2(tubelet: Callable[..., Any]) -> None:
    result = tubelet("fleet", "plan", "absent.toml")
    assert result.code == 2 and "cannot read absent.toml: No such file or directory" in result.err


def test_the_examples_of_the_docs_can_be_read(spec: ModelSpec) -> None:
    examples = Path(__file__).parent.parent / "docs" / "examples"
    fleet = read_fleet(examples / "fleet.toml")
    assert read_traffic(examples / fleet.traffic, spec)
