"""How much each site's rounding costs the final latents -> which site is rounded to what, under a budget.

Flows in: measured errors of single sites. Flows out: for each site the place on the ladder, from the narrowest format
up to none. Errors of sites are taken to add up as independent ones do, in squares; what was chosen is then measured
whole, and chosen again more strictly where that was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

from tubelet.runtime.errors import UserError

MARGIN = 0.95  # of what a whole measurement says is needed


@dataclass(frozen=True)
class Cost:
    """A site on each place of the ladder; the last place is float32, with no error."""

    errors: tuple[float, ...]  # of the final latents, relative, when this site alone is rounded
    bits: tuple[float, ...]  # of its weights


Levels = Mapping[str, int]  # by site


def choose(costs: Mapping[str, Cost], budget: float, measure: Callable[[Levels], float]) -> Levels:
    """The cheapest levels whose measured error is at most the budget.

    Raises UserError when not even the least sensitive site can be rounded, and says the budget that would do for it.
    """
    target = budget
    while True:
        levels = cheapest(costs, target)
        last = not _rounds_any(costs, levels)
        if last:
            levels = _least_sensitive(costs)
        error = measure(levels)
        if error <= budget:
            return levels
        if last:
            raise UserError(
                f"--budget {budget:g} cannot be met: with only the least sensitive layers rounded, those that read one "
                f"value, the final latents' error is {_rounded_up(error):g}; give at least that"
            )
        target *= MARGIN * budget / error


def cheapest(costs: Mapping[str, Cost], budget: float) -> Levels:
    """Widens sites, the one that saves most error for its bits first, until the sum of squares is within the budget."""
    levels = dict.fromkeys(costs, 0)

    def gain(site: str) -> float:
        """Squared error saved for each bit by the next places, at the best of them."""
        cost, at = costs[site], levels[site]
        return max(
            (
                (cost.errors[at] ** 2 - cost.errors[to] ** 2) / (cost.bits[to] - cost.bits[at])
                for to in _wider(cost, at)
            ),
            default=0.0,
        )

    while sum(costs[site].errors[at] ** 2 for site, at in levels.items()) > budget**2:
        levels[max(costs, key=gain)] += 1
    return levels


def _rounded_up(value: float) -> float:
    """To two digits, never below the value."""
    return float(Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(value))


def _rounds_any(costs: Mapping[str, Cost], levels: Levels) -> bool:
    return any(levels[site] < len(cost.errors) - 1 for site, cost in costs.items())


def _least_sensitive(costs: Mapping[str, Cost]) -> Levels:
    """Only the site and place with the least error of all rounded."""
    error, site = min((min(cost.errors[:-1]), site) for site, cost in costs.items())
    levels = {name: len(cost.errors) - 1 for name, cost in costs.items()}
    return levels | {site: costs[site].errors.index(error)}


def _wider(cost: Cost, at: int) -> Sequence[int]:
    return range(at + 1, len(cost.errors))
