"""A fleet plan and the folder it is for -> what the folder lacks to serve the fleet.

Flows in: a FleetPlan. Flows out: holes, none where every component has a plan for every SKU, built from the bundle's
weights for the traffic's profiles, whole, and small enough by what the compiler measured. Needs no torch, no compiler
and no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tubelet.runtime.bundle import Bundle
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import PlanRecord, installed
from tubelet.runtime.residency import footprint

from .fleet import FleetPlan, Sku, load


@dataclass(frozen=True)
class Hole:
    """What cannot be served on one or more SKUs: one component, or those of a model together."""

    model: str
    component: str | None
    skus: tuple[str, ...]
    reason: str


def check_fleet(planned: FleetPlan) -> list[Hole]:
    """Verifies every plan of the fleet by its record and content, and that those of a SKU go together and fit."""
    holes: list[Hole] = []
    found: dict[tuple[str, str], dict[str, PlanRecord]] = {}  # by model and SKU: the record of each component
    for build in planned.builds:
        try:
            record = installed(planned.bundles[build.model], build.component, build.target, build.profiles)
        except UserError as error:
            holes.append(Hole(build.model, build.component, build.skus, str(error)))
            continue
        for name in build.skus:
            found.setdefault((build.model, name), {})[build.component] = record
    for sku in planned.fleet.sku:
        for model, bundle in planned.bundles.items():
            records = found.get((model, sku.name), {})
            reasons = [_differing(records)]
            if records.keys() == bundle.manifest.components.keys():  # else its memory is not known
                reasons.append(_too_big(bundle, sku, records))
            holes += [Hole(model, None, (sku.name,), reason) for reason in reasons if reason is not None]
    return holes


def _differing(records: Mapping[str, PlanRecord]) -> str | None:
    """A machine has one release of a compiler, which loads no other's plans."""
    releases = sorted({f"{each.compiler.name} {each.compiler.version}" for each in records.values()})
    return f"its plans are of {', '.join(releases)}; build all with one release" if len(releases) > 1 else None


def _too_big(bundle: Bundle, sku: Sku, records: Mapping[str, PlanRecord]) -> str | None:
    """What the runtime says before it loads these plans, if it is a refusal."""
    components = bundle.manifest.components
    loading = load(sku, {name: footprint(components[name], record) for name, record in records.items()})
    return None if loading.fits else loading.sentence
