"""One component's graph + profiles + target -> a verified plan, by TensorRT or TensorRT-RTX.

Flows in: a Job, plain data, and in the working folder the graph and its weights. Flows out: a plan in that folder, and
its record. The two compilers share this code and differ in what their modules offer. No GPU is needed to build for
TensorRT-RTX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tubelet.runtime.bundle import Shape, record
from tubelet.runtime.compiler_log import make_logger
from tubelet.runtime.plans import Measured, PlanRecord, Target
from tubelet.runtime.profiles import Profile
from tubelet.runtime.resident import peak_resident_bytes
from tubelet.runtime.tensorrt import compiler_of, load_module

from .compiler_report import HEADER, Report, architectures, parse_report
from .engine_report import load_report
from .errors import CompilerError
from .precision import Lowered, lower
from .profiles import Bounds, input_shapes
from .repeatable import in_fresh_memory

NO_DRIVER = "cudaError 35"  # logged throughout on a machine without a GPU, where it means nothing
GRAPH, TYPED, PLAN = Path("graph.onnx"), Path("typed.onnx"), Path("plan")  # in the folder of a job


@dataclass(frozen=True)
class Event:
    """How far the building of a component is."""

    component: str
    phase: str
    done: int
    steps: int


@dataclass(frozen=True)
class Job:
    """What one plan is built from."""

    component: str
    key: str
    inputs: Mapping[str, Shape]
    target: Target
    profiles: tuple[Profile, ...]
    budget: int | None  # bytes of device memory for activations

    def bounds(self) -> list[dict[str, Bounds]]:
        """The least, optimal and greatest shape of every input in each profile."""
        return [input_shapes(self.inputs, profile) for profile in self.profiles]


def compile_component(job: Job, on_event: Callable[[Event], None]) -> PlanRecord:
    """Builds and verifies the plan of GRAPH as PLAN, both in the working folder, where the weights are too.

    Raises CompilerError when the compiler refuses or the plan is not what was asked for.
    """
    start, trt = time.monotonic(), load_module(job.target.compiler)
    logger = make_logger(trt, keep=("Layers:", "Total "), but=NO_DRIVER)
    lowered = lower(ir.load(GRAPH), job.target.narrow, job.target.wide_products)
    ir.save(lowered.model, TYPED)
    in_fresh_memory(lambda: _write_plan(trt, logger, job, on_event))
    report = parse_report(logger.lines) if job.target.compiler == "rtx" else load_report(trt, logger, PLAN)
    verify(job, lowered, report, PLAN)
    fallen_back = report.fallen_back(lowered.rounded)
    return PlanRecord(
        component=job.component,
        key=job.key,
        target=job.target,
        compiler=compiler_of(trt),
        dtypes=report.dtypes,
        profiles=job.profiles,
        budget=job.budget,
        file=record(PLAN),
        measured=Measured(
            weights_bytes=report.weights_bytes,
            activation_bytes=report.activation_bytes,
            kernels=len(report.layers),
            fused_attentions=report.fused_attentions // len(job.profiles),
            wide_products=report.wide_products // len(job.profiles),
            rounded_products=len(lowered.rounded) - len(fallen_back),
            fallen_back=fallen_back,
            seconds=round(time.monotonic() - start, 1),
            peak_bytes=peak_resident_bytes(),
        ),
    )


def verify(job: Job, lowered: Lowered, report: Report, plan: Path) -> None:
    """Raises CompilerError unless the plan is for the architectures, ports and profiles asked for, and well fused."""
    if job.target.compiler == "rtx":
        _verify_rtx(job, lowered, report, plan)
    claims: list[tuple[str, Any, Any]] = [
        ("types of inputs and outputs", report.dtypes, lowered.dtypes),
        ("profiles", list(report.profiles), job.bounds()),
        ("profiles with known activation memory", len(report.activation_bytes), len(job.profiles)),
    ]
    _require(job, claims)
    most = max(report.activation_bytes)
    if job.budget is not None and most > job.budget:
        raise CompilerError(
            f"{job.component}: the plan needs {most:,} bytes for activations, the budget is {job.budget:,}"
        )


def _verify_rtx(job: Job, lowered: Lowered, report: Report, plan: Path) -> None:
    """Its architectures, and what the names of its kernels tell; TensorRT's names were never seen."""
    size = plan.stat().st_size
    with plan.open("rb") as file:
        header = file.read(HEADER.size)
    claims = [
        ("architectures", architectures(header, size), job.target.architectures),
        ("fused attentions", report.fused_attentions, lowered.attentions * len(job.profiles)),
    ]
    _require(job, claims)
    if report.wide_products > lowered.wide_products * len(job.profiles):
        raise CompilerError(
            f"{job.component}: {report.wide_products} matrix products run in float32, the graph asks for "
            f"{lowered.wide_products} in each of {len(job.profiles)} profiles"
        )


def _require(job: Job, claims: Sequence[tuple[str, Any, Any]]) -> None:
    for what, found, wanted in claims:
        if found != wanted:
            raise CompilerError(f"{job.component}: the plan has {what} {found}, asked for were {wanted}")


def _write_plan(trt: Any, logger: Any, job: Job, on_event: Callable[[Event], None]) -> None:
    builder, network, _parser = _parse(trt, logger, job)
    config = _configure(trt, builder, job, on_event)
    with PLAN.open("wb") as file:
        writer = _writer(trt, file)
        if not builder.build_serialized_network_to_stream(network, config, writer):
            within = f" within {job.budget:,} bytes for activations" if job.budget is not None else ""
            raise writer.error or CompilerError(f"the compiler refused {job.component}{within}: {logger.problems()}")


def _parse(trt: Any, logger: Any, job: Job) -> tuple[Any, Any, Any]:
    """A builder, the graph's network, and the parser, which owns weights that the network uses."""
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(TYPED)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise CompilerError(f"the compiler cannot read {job.component}: {errors}")
    return builder, network, parser


def _configure(trt: Any, builder: Any, job: Job, on_event: Callable[[Event], None]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 in a narrow graph is so for its precision
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)  # scratch memory by shape
    config.progress_monitor = _monitor(trt, job.component, on_event)
    if job.budget is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.budget)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for bounds in job.bounds():
        profile = builder.create_optimization_profile()
        for name, shapes in bounds.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise CompilerError(f"{job.component}: the compiler refused the profile {bounds}")
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(job.target.architectures)
        for index, name in enumerate(job.target.architectures):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index):
                raise CompilerError(f"{job.component}: the compiler refused the architecture {name}")
    return config


def _monitor(trt: Any, component: str, on_event: Callable[[Event], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Hands the builder's steps on."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            on_event(Event(component, name, step + 1, self.steps.get(name, 0)))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):
        """Hands the plan on, part by part; remembers why it could not."""

        error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return int(file.write(data))
            except OSError as error:  # which must not cross the compiler
                self.error = error
                return 0

    return Writer()
