"""Find the lowest reachable value of every budget, before calibration. A budget out of reach is an error."""

from collections.abc import Mapping
from math import log10

from deploypipe.budgets import BUDGETS
from deploypipe.errors import BudgetError
from deploypipe.records import Feasibility
from deploypipe.search.allocation.proposer import Proposer
from deploypipe.search.allocation.solver import Allocation, Emphasis, allowed_widths
from deploypipe.text.amounts import share_limit_text

_TOLERANCE = 0.03  # relative; a budget that is missed by less in the prediction may still be met


def find_feasibility(proposer: Proposer, shares: Mapping[str, float]) -> Feasibility:
    """Find the least share of each bounded figure, whatever the accuracy, and count the choices.

    The least latency is that of the fastest network measured; other figures are counted.
    Raises BudgetError if a budget, or all of them together, cannot be met. It names the nearest reachable value.
    """
    model = proposer.latency_model(())
    at = {name: number for number, name in enumerate(shares)}

    def figure(name: str, allocation: Allocation) -> float:
        return proposer.figures(allocation, model)[at[name]]

    timed = [name for name in shares if BUDGETS[name].predictor == "latency_model"]
    least = {name: figure(name, proposer.cheapest(name)) for name in shares if name not in timed}
    if model:
        least |= dict.fromkeys(timed, model.least)
    for name, share in shares.items():
        require_feasible(name, least[name], share)
    together = proposer.allocate(Emphasis(), model, dict(shares))
    for name, share in shares.items():
        reached = figure(name, together)
        if reached > share * (1 + _TOLERANCE):
            others = " and ".join(f"budget.{other}" for other in shares if other != name)
            raise BudgetError(
                f"budget.{name}: {share:.3g} times the dense network's cannot be met together with {others}; the "
                f"nearest network reaches {reached:.3g} times; relax one of them in the target"
            )
    return Feasibility(least=least, log10_choices=_log10_choices(proposer))


def require_feasible(name: str, least: float, share: float) -> None:
    """Raise BudgetError if the least reachable share of a figure exceeds the allowed one."""
    if least > share * (1 + _TOLERANCE):
        raise BudgetError(
            f"budget.{name}: {share:.3g} times the dense network's is out of reach: the smallest network that the "
            f"recipe allows reaches {least:.3g} times; relax the budget in the target to {round_up(least):.2f}x or "
            "more, or allow more to be removed (recipe: keep, constraints; target: channel_multiple)"
        )


def round_up(share: float) -> float:
    """Round up to hundredths."""
    return -(-share * 100 // 1) / 100


def feasibility_text(reach: Feasibility, shares: Mapping[str, float]) -> str:
    """List the share of each budget that the search may use (the limit less a margin for noise) and the least share."""
    budgets = ", ".join(
        f"{name} {share_limit_text(share, 2)} (lowest {reach.least[name]:.2g}x)" for name, share in shares.items()
    )
    return f"in reach, with a margin for noise: {budgets}; 10^{reach.log10_choices:.0f} choices"


def _log10_choices(proposer: Proposer) -> float:
    widths = allowed_widths(proposer.structures, proposer.curves)
    blocks = sum(curve.kind == "block" for curve in proposer.curves.curves)
    return sum(log10(len(kept)) for kept in widths.values()) + blocks * log10(2)
