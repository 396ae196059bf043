"""Bundle -> quantized bundle, read top to bottom.

Flows in: a bundle and a Plan. Flows out: a bundle of the same components whose denoiser's linear layers are rounded,
with the measured damage in it; whole or not at all. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from tubelet.runtime import Bundle, Pipeline, Request
from tubelet.runtime.atomic import new_folder
from tubelet.runtime.bundle import MANIFEST, TOKENIZER, WEIGHTS, content_key, record, write_manifest
from tubelet.runtime.errors import UserError
from tubelet.runtime.precision import (
    COMPONENT,
    WIDE,
    Damage,
    LayerPrecision,
    Precision,
    read_precision,
    write_precision,
)
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.strict import require

from ..content import borrow, graph_digest, place
from .choose import Cost, Levels, choose
from .formats import FORMATS
from .linear import Site, sites
from .passes import Roundings, round_layers
from .search import Found, search
from .trajectory import observe
from .trials import Trials, damage
from .weights import digest, files, is_new_or_in, store, unused

LADDERS = {name: (name,) for name in FORMATS} | {"nvfp4": ("nvfp4", "fp8")}  # what a budget may fall back to, then WIDE
LEAST_PROMPTS = 4
MEASURED_CLIPS, MEASURED_SEED = 4, 1_000_000  # no seed of the calibration
WIDE_BITS = 16  # of a weight that is not rounded, in plans and in most files
RANKING_STEPS = 8  # of the trajectories that compare sites; what was chosen is measured on whole ones


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    precision: str  # a name in FORMATS
    prompts: tuple[str, ...]  # of the calibration's trajectories
    keep: tuple[str, ...] = ()  # patterns of layers that stay as they are
    budget: float | None = None  # most relative error of the final latents

    def __post_init__(self) -> None:
        require(self.precision in FORMATS, f"precision {self.precision!r} is not one of {', '.join(FORMATS)}")
        if len(self.prompts) < LEAST_PROMPTS:
            raise UserError(f"calibration needs {LEAST_PROMPTS} prompts or more, has {len(self.prompts)}; add some")
        if self.budget is not None:
            require(0 < self.budget < float("inf"), f"--budget must be above 0, is {self.budget:g}")


def quantize(
    source: Bundle,
    output: Path,
    plan: Plan,
    copy: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Makes the quantized bundle `output`.

    Files of weights that hold nothing of the denoiser's are hard links to the source's, or with `copy` copies. Raises
    UserError when the source is quantized already or needs more than a prompt, a pattern matches nothing, the budget
    cannot be met, a prompt does not suit the model, or `output` exists or cannot be written.
    """
    _require_prompts_alone(source.spec)
    if (known := read_precision(source)) is not None:
        raise UserError(
            f"{source.folder} is quantized to {known.precision} already; "
            f"quantize the bundle with key {known.source[:16]} that it was made from"
        )
    denoiser = ir.load(source.graph(COMPONENT))
    wanted = sites(denoiser, plan.keep)
    _require_blocks(plan, wanted)
    with new_folder(output) as partial, Pipeline.open(source, "cpu") as pipeline:
        with workplace(source, partial) as work:
            on_stage(f"calibrate on {len(plan.prompts)} prompts")
            requests = [Request(prompt, seed=seed) for seed, prompt in enumerate(plan.prompts)]
            seen = observe(pipeline, source.graph(COMPONENT), work, requests)
            found = {}
            for number, site in enumerate(wanted, start=1):
                on_stage(f"search scales, {number} of {len(wanted)}")
                found[site.name] = [search(site, seen[site.name], FORMATS[name]) for name in LADDERS[plan.precision]]
            levels = _levels(source, plan, wanted, found, Trials(source, pipeline, work), on_stage)
        chosen = _chosen(wanted, found, levels)
        on_stage("write")
        rounded = write(source, partial, _roundings(chosen), copy)
        on_stage(f"measure {MEASURED_CLIPS} clips")
        with Pipeline.open(rounded, "cpu") as narrow:
            harm = damage(narrow, pipeline, _measured(plan))
        write_precision(partial, _precision(source, rounded, plan, chosen, harm))
        seal(rounded)
    return Bundle.open(output)


@contextmanager
def workplace(source: Bundle, folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, for a while, with the weights that graphs made of the bundle's denoiser refer to."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name in files(ir.load(source.graph(COMPONENT)).graph):  # ONNX Runtime follows no symbolic links to weights
            borrow(source.path(name), Path(work, name))
        yield Path(work)


def _require_prompts_alone(spec: ModelSpec) -> None:
    """Raises UserError for a model that calibration cannot run as a whole."""
    require(len(spec.experts) == 1, f"{spec.name} has two denoisers; only models of one can be quantized yet")
    require(
        not spec.denoiser.shown_channels and spec.image_encoder is None,
        f"{spec.name} makes clips of pictures; only models that need a prompt alone can be quantized yet",
    )


def _require_blocks(plan: Plan, wanted: Sequence[Site]) -> None:
    """Raises UserError for a layer whose inputs do not fill blocks of the format."""
    block = FORMATS[plan.precision].block or 1
    for layer in [layer for site in wanted for layer in site.layers]:
        inputs = layer.shape[1]
        require(
            inputs % block == 0,
            f"{plan.precision} needs inputs in blocks of {block}, {layer.name} has {inputs}; leave it out with --keep",
        )


def _measured(plan: Plan) -> list[Request]:
    """Requests whose noise is no part of the calibration."""
    return [Request(prompt, seed=MEASURED_SEED + i) for i, prompt in enumerate(plan.prompts[:MEASURED_CLIPS])]


def _levels(
    source: Bundle,
    plan: Plan,
    wanted: Sequence[Site],
    found: Mapping[str, Sequence[Found]],
    trials: Trials,
    on_stage: Callable[[str], None],
) -> Levels:
    """Every site at the precision asked for; under a budget, each where its measured sensitivity allows."""
    if plan.budget is None:
        return dict.fromkeys(found, 0)
    request = dataclasses.replace(_measured(plan)[0], steps=min(RANKING_STEPS, source.spec.defaults.steps))
    costs = {}
    for number, site in enumerate(wanted, start=1):
        on_stage(f"measure sensitivity, {number} of {len(wanted)}")
        places = range(len(found[site.name]))
        errors = [trials.error(_roundings(_chosen([site], found, {site.name: at})), [request]) for at in places]
        bits = [site.parameters * each.rounding.format.bits for each in found[site.name]]
        costs[site.name] = Cost((*errors, 0.0), (*bits, site.parameters * WIDE_BITS))

    def measure(levels: Levels) -> float:
        on_stage("measure the choice")
        return trials.error(_roundings(_chosen(wanted, found, levels)), _measured(plan))

    return choose(costs, plan.budget, measure)


def _chosen(wanted: Sequence[Site], found: Mapping[str, Sequence[Found]], levels: Levels) -> dict[str, Found]:
    """What was found at these levels, by layer; nothing for layers that stay wide."""
    return {
        layer.name: found[site.name][levels[site.name]]
        for site in wanted
        for layer in site.layers
        if levels[site.name] < len(found[site.name])
    }


def _roundings(chosen: Mapping[str, Found]) -> Roundings:
    return {layer: found.rounding for layer, found in chosen.items()}


def write(source: Bundle, folder: Path, roundings: Roundings, copy: bool = False) -> Bundle:
    """All of a bundle but the record of its precision and the manifest.

    Files of weights that the denoiser reads become one, with what other graphs read of them; the others stay, under
    the names that their graphs refer to.
    """
    components = source.manifest.components
    shutil.copyfile(source.path(TOKENIZER), folder / TOKENIZER)
    models = {name: ir.load(source.graph(name)) for name in components}
    replaced = files(models[COMPONENT].graph)
    kept = [name for name in source.manifest.weights if name not in replaced]
    for name in kept:
        place(source.path(name), folder / name, copy)
    models[COMPONENT] = round_layers(models[COMPONENT], roundings)
    made = unused(folder / WEIGHTS)
    store([model.graph for model in models.values()], made, is_new_or_in(replaced))
    for name, model in models.items():
        ir.save(model, folder / components[name].graph)
    rounded = models[COMPONENT]
    denoiser = dataclasses.replace(
        components[COMPONENT], graph_digest=graph_digest(rounded), weights_digest=digest(rounded.graph)
    )
    manifest = dataclasses.replace(
        source.manifest,
        provenance={**source.manifest.provenance, "quantized_from": source.key},
        components={**components, COMPONENT: denoiser},
        weights=(*kept, made.name),
        parity=tuple(row for row in source.manifest.parity if row.component != COMPONENT),
    )
    return Bundle(folder, manifest)


def seal(bundle: Bundle) -> Bundle:
    """The bundle with its key and the hashes of the files that it has now, and its manifest written."""
    (bundle.folder / MANIFEST).unlink(missing_ok=True)
    hashed = {path.name: record(path) for path in sorted(bundle.folder.iterdir())}
    key = content_key(bundle.spec, bundle.manifest.components, hashed[TOKENIZER])
    manifest = dataclasses.replace(bundle.manifest, files=hashed, key=key)
    write_manifest(bundle.folder, manifest)
    return Bundle(bundle.folder, manifest)


def _precision(source: Bundle, rounded: Bundle, plan: Plan, chosen: Mapping[str, Found], harm: Damage) -> Precision:
    layers = []
    for layer in [layer for site in sites(ir.load(source.graph(COMPONENT))) for layer in site.layers]:
        if layer.name in chosen:
            found = chosen[layer.name]
            migrated = found.rounding.factors is not None
            row = LayerPrecision(layer.name, found.rounding.format.name, migrated, found.errors[layer.name])
        else:
            row = LayerPrecision(layer.name, WIDE, False, 0.0)
        layers.append(row)
    return Precision(
        precision=plan.precision,
        source=source.key,
        keep=plan.keep,
        budget=plan.budget,
        prompts=len(plan.prompts),
        weights_bytes=_weights_bytes(rounded),
        source_weights_bytes=_weights_bytes(source),
        layers=tuple(layers),
        damage=harm,
    )


def _weights_bytes(bundle: Bundle) -> int:
    return sum(bundle.path(name).stat().st_size for name in bundle.manifest.weights)
