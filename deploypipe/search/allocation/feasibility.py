"""What a search can come to, told before anything is observed; a budget out of reach ends there."""

from collections.abc import Mapping
from math import log10

from deploypipe.errors import BudgetError
from deploypipe.records import Feasibility
from deploypipe.search.allocation.proposer import Proposer
from deploypipe.search.allocation.solver import Allocation, Emphasis, allowed_widths

_TOLERANCE = 0.03  # relative: a budget that is predicted to be missed by less may be met


def find_feasibility(proposer: Proposer, shares: Mapping[str, float]) -> Feasibility:
    """The least share of each bounded figure, and how many choices there are. What they lose does not matter.

    The least latency is that of the fastest network that was measured; other figures are counted.
    Raises BudgetError where a budget is below the least there is, or where all of them together are, naming the
    nearest that can be had.
    """
    model = proposer.latency_model(())
    at = {name: number for number, name in enumerate(shares)}

    def figure(name: str, allocation: Allocation) -> float:
        return proposer.figures(allocation, model)[at[name]]

    least = {name: figure(name, proposer.cheapest(name)) for name in shares if name != "latency_p50"}
    if model and "latency_p50" in shares:
        least["latency_p50"] = model.least
    for name, share in shares.items():
        require_feasible(name, least[name], share)
    together = proposer.allocate(Emphasis(), model, dict(shares))
    for name, share in shares.items():
        reached = figure(name, together)
        if reached > share * (1 + _TOLERANCE):
            others = " and ".join(f"budget.{other}" for other in shares if other != name)
            raise BudgetError(
                f"budget.{name}: {share:.3g} times the dense network's cannot be had together with {others}; the "
                f"nearest network comes to {reached:.3g} times it: relax one of them in the target"
            )
    return Feasibility(least=least, log10_choices=_log10_choices(proposer))


def require_feasible(name: str, least: float, share: float) -> None:
    """BudgetError where the least there is of a figure is more than the share of the dense one that is allowed."""
    if least > share * (1 + _TOLERANCE):
        raise BudgetError(
            f"budget.{name}: {share:.3g} times the dense network's is out of reach: the smallest network that the "
            f"recipe allows comes to {least:.3g} times it; relax the budget in the target to {round_up(least):.2f}x or "
            "more, or let more go (recipe: keep, constraints; target: channel_multiple)"
        )


def round_up(share: float) -> float:
    """To hundredths."""
    return -(-share * 100 // 1) / 100


def feasibility_text(reach: Feasibility, shares: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {share:.2g}x (least {reach.least[name]:.2g}x)" for name, share in shares.items())
    return f"in reach: {told}; 10^{reach.log10_choices:.0f} choices"


def _log10_choices(proposer: Proposer) -> float:
    widths = allowed_widths(proposer.structures, proposer.curves)
    blocks = sum(curve.kind == "block" for curve in proposer.curves.curves)
    return sum(log10(len(kept)) for kept in widths.values()) + blocks * log10(2)
