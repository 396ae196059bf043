"""A fleet plan -> the engines that can be built here, and what is left.

Flows in: a FleetPlan. Flows out: plans in its bundles, and a Rest for all that is still missing, with the command that
makes it where there is one. What is there already is kept, wherever it was built: a fleet's build goes on where it was.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tubelet.runtime.bundle import Bundle
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import PlanRecord, Target, installed
from tubelet.runtime.profiles import Profile, Profiles

from .compile import Event
from .engines import build_engines
from .errors import CompilerError
from .fleet import Fleet, FleetPlan


@dataclass(frozen=True)
class Order:
    """Plans of one model for one target: what one `tubelet build` makes."""

    model: str
    target: Target
    memory_gb: float  # of the smallest GPU that loads them
    profiles: Profiles


@dataclass(frozen=True)
class Rest:
    """Plans that were not built here, why, and what builds them on the GPU of the order's target."""

    order: Order
    reason: str
    command: str | None


def build_fleet(
    planned: FleetPlan,
    workers: int,
    on_order: Callable[[Order], None] = lambda order: None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_built: Callable[[PlanRecord, bool], None] = lambda record, kept: None,
) -> list[Rest]:
    """Builds what any machine can, order by order, the components of one in parallel; returns the rest.

    Raises UserError when the compiler is missing or a bundle cannot be written. What the compiler refuses is rest.
    """
    rest = []
    for order in orders(planned):
        bundle = planned.bundles[order.model]
        if not order.target.can_be_built:
            rest.append(Rest(order, f"{order.target.precision} plans cannot be built yet", None))
        elif order.target.gpu is None:
            on_order(order)
            try:
                build_engines(bundle, order.target, order.profiles, workers, order.memory_gb, on_event, on_built)
            except CompilerError as error:
                rest.append(Rest(missing(bundle, order) or order, str(error), None))
        elif left := missing(bundle, order):
            told = command(planned.fleet, bundle, left)
            rest.append(Rest(left, f"they are built on {order.target.gpu}", told))
    return rest


def orders(planned: FleetPlan) -> list[Order]:
    """A fleet's builds, those of one model, target and memory together."""
    found: dict[tuple[str, Target, float], dict[str, Sequence[Profile]]] = {}
    for build in planned.builds:
        found.setdefault((build.model, build.target, build.memory_gb), {})[build.component] = build.profiles
    return [Order(*key, profiles) for key, profiles in found.items()]


def missing(bundle: Bundle, order: Order) -> Order | None:
    """The part of an order that the bundle lacks."""
    left = {}
    for component, profiles in order.profiles.items():
        try:
            installed(bundle, component, order.target, profiles)
        except UserError:
            left[component] = profiles
    return dataclasses.replace(order, profiles=left) if left else None


def command(fleet: Fleet, bundle: Bundle, order: Order) -> str:
    """The shell line that builds an order, to be typed in the folder of fleet.toml."""
    words = ["tubelet", "build", order.model, "--target", str(order.target), "--precision", order.target.precision]
    words += ["--memory", f"{order.memory_gb:g}", "--traffic", fleet.traffic, "--max-profiles", str(fleet.max_profiles)]
    if set(order.profiles) != set(bundle.manifest.components):
        words += [word for component in order.profiles for word in ("--component", component)]
    return f"{shlex.join(words)}  # on {order.target.gpu}"
