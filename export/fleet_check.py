"""A fleet plan and the folder it is for -> what the folder lacks to serve the fleet.

Flows in: a FleetPlan. Flows out: holes, none where every component has a plan for every SKU, built from the bundle's
weights for the traffic's profiles, whole, and small enough by what the compiler measured. Needs no torch, no compiler
and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import PlanRecord, installed

from .fleet import FleetPlan, Sku


@dataclass(frozen=True)
class Hole:
    """What cannot be served: one component on one or more SKUs."""

    model: str
    component: str
    skus: tuple[str, ...]
    reason: str


def check_fleet(planned: FleetPlan) -> list[Hole]:
    """Verifies every plan of the fleet by its record and content, and the memory of every cell."""
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
            if records.keys() == bundle.manifest.components.keys():  # else its memory is not known
                holes += _too_big(model, sku, records)
    return holes


def _too_big(model: str, sku: Sku, records: Mapping[str, PlanRecord]) -> Iterator[Hole]:
    """Cells whose memory, that of all weights and of one component's activations, is more than the machine has."""
    weights = sum(record.measured.weights_bytes for record in records.values())
    for component, record in records.items():
        for index, activations in enumerate(record.measured.activation_bytes):
            if weights + activations > sku.memory_gb * 10**9:
                yield Hole(
                    model,
                    component,
                    (sku.name,),
                    f"profile {index} takes {weights + activations:,} bytes, the machine has {sku.memory_gb:g} GB",
                )
