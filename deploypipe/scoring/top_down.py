"""From the outputs to the inputs: what a unit is worth is asked of those outputs of its readers that are kept.

The order of arXiv:2411.00147 and arXiv:2108.12594. Only groups with a reader whose inputs were observed can be ranked
so; the others are scored by magnitude.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deploypipe.observe.moments import Moments
from deploypipe.observe.patches import columns, num_taps, weight_matrix
from deploypipe.recipe import Magnitude
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import score_magnitude

UNOBSERVED = "none of its consumers could be observed; scored by magnitude"
STEP = 1e-9  # keeps the order in which units were taken where nothing is lost or gained


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """An observed consumer of a group, with those m of its outputs that count as kept."""

    module: str
    covariance: Tensor  # (p, p) float64, of all that it reads
    weights: Tensor  # (p, m) float64
    outputs: list[int]  # the m outputs, in the module's own numbering
    regressors: list[list[int]]  # by unit of the group: which of the p


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """How one group's units are ordered."""

    scores: tuple[float, ...]  # by unit, higher = keep
    suggested: int | None = None  # how many the method itself would keep


class Removal(Protocol):
    """Units that can be taken away one by one."""

    def losses(self) -> Tensor: ...
    def remove_(self, group: int) -> None: ...


def score_top_down(
    model: nn.Module,
    structures: Structures,
    moments: Moments,
    rank: Callable[[list[Reader]], Ranking],
    *,
    scorer: str,
    is_cumulative: bool,
    keep: float = 1.0,
) -> ScoreTable:
    """`rank` every group, from the last to the first, by what its readers' kept outputs need.

    An output that is a unit of a group ranked before counts only if that unit is kept: if it is among the suggested
    number, or where nothing is suggested among the `keep` share, of highest score. Outputs of no group, or of a group
    whose turn comes later (a residual stream comes where its first producer does), always count. Should none of a
    reader's outputs count, all do, because surgery leaves every layer at least one.
    """
    modules = dict(model.named_modules())
    by_magnitude = score_magnitude(model, structures, moments, Magnitude(), seed=0).channels
    unkept: dict[str, set[int]] = {}  # by module: outputs
    rankings, reasons = {}, {}
    for group in reversed(structures.groups):
        readers = _readers(group, modules, moments, unkept)
        if not readers:
            reasons[group.name] = UNOBSERVED
        ranking = rank(readers) if readers else Ranking(scores=by_magnitude[group.name])
        rankings[group.name] = ranking
        width = max(1, round(keep * group.num_units)) if ranking.suggested is None else ranking.suggested
        going = sorted(range(group.num_units), key=ranking.scores.__getitem__)[: group.num_units - width]
        for member in group.members:
            if member.side == "out":
                unkept.setdefault(member.module, set()).update(i for unit in going for i in member.units[unit])
    order = [group.name for group in structures.groups]
    return ScoreTable(
        scorer=scorer,
        channels={name: rankings[name].scores for name in order},
        suggested={name: asked for name in order if (asked := rankings[name].suggested) is not None},
        reasons={name: reasons[name] for name in order if name in reasons},
        is_cumulative=is_cumulative,
    )


def _readers(
    group: ChannelGroup, modules: dict[str, nn.Module], moments: Moments, unkept: dict[str, set[int]]
) -> list[Reader]:
    found = []
    for member in group.members:
        if member.side == "in" and member.module in moments.inputs:
            layer: Any = modules[member.module]
            weights = weight_matrix(layer).detach().double()
            every = range(len(weights))
            outputs = [o for o in every if o not in unkept.get(member.module, ())] or list(every)
            found.append(
                Reader(
                    module=member.module,
                    covariance=moments.inputs[member.module].covariance,
                    weights=weights[outputs].T.contiguous(),
                    outputs=outputs,
                    regressors=[columns(unit, num_taps(layer)) for unit in member.units],
                )
            )
    return found


def remove_one_by_one(problems: Sequence[Removal], num_units: int) -> tuple[list[int], list[float]]:
    """Remove the unit whose loss, summed over all problems, is least, again and again: (order, losses on removal)."""

    def remove_(unit: int) -> None:
        for problem in problems:
            problem.remove_(unit)

    return take_one_by_one(lambda: [problem.losses() for problem in problems], remove_, num_units)


def take_one_by_one(
    amounts: Callable[[], list[Tensor]], take_: Callable[[int], None], num_units: int, *, greatest: bool = False
) -> tuple[list[int], list[float]]:
    """Take the unit of least (or greatest) summed amount, again and again: (order, amounts when taken)."""
    order: list[int] = []
    taken: list[float] = []
    sign = -1.0 if greatest else 1.0
    gone = torch.zeros(num_units, dtype=torch.float64)
    for _ in range(num_units):
        now = torch.stack(amounts()).sum(0).nan_to_num(nan=0.0)
        unit = int((sign * now + gone).argmin())
        order.append(unit)
        taken.append(max(float(now[unit]), 0.0))
        gone[unit] = torch.inf
        take_(unit)
    return order, taken


def cumulative(order: Sequence[int], amounts: Sequence[float]) -> tuple[float, ...]:
    """By unit: the sum of all amounts up to its turn. Strictly rising in `order`."""
    scores, total = [0.0] * len(order), 0.0
    for step, (unit, amount) in enumerate(zip(order, amounts, strict=True)):
        total += amount
        scores[unit] = total + step * STEP
    return tuple(scores)
