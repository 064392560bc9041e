"""Rank groups from the outputs to the inputs: a unit is scored by the kept outputs of its readers.

This is the order of arXiv:2411.00147 and arXiv:2108.12594. Only groups with an observed reader can be ranked so; the
others are scored by magnitude. Groups of one shape that do not feed each other, such as those of a stage of residual
blocks, are ranked together, because a step of a small group costs mostly function calls.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deploypipe.observe.layer_regressions import columns, num_taps, reads, weight_matrix, writes
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Magnitude
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import score_magnitude

UNOBSERVED = "none of its consumers could be observed; scored by magnitude"
STEP = 1e-9  # keeps the order in which units were taken if nothing is lost or gained
_MAX_VALUES = 2**22  # of covariances ranked together; larger stacks gain nothing and need memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """An observed consumer of a group, with the m outputs that count as kept; stacked for b groups (*)."""

    modules: list[str]  # b
    covariance: Tensor  # (*, p, p) float64, of all its inputs
    weights: Tensor  # (*, p, m) float64
    outputs: list[list[int]]  # the m outputs of each, in the module's own numbering
    regressors: list[list[int]]  # by unit of the group: which of the p


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The order of one group's units."""

    scores: tuple[float, ...]  # by unit, higher = keep
    suggested: int | None = None  # the number of units the method itself would keep


class Removal(Protocol):
    """A problem from which units can be removed one by one."""

    def losses(self) -> Tensor: ...
    def remove_(self, group: Tensor) -> None: ...


def score_top_down(
    model: nn.Module,
    structures: Structures,
    moments: Moments,
    rank: Callable[[list[Reader]], list[Ranking]],
    *,
    scorer: str,
    is_cumulative: bool,
    keep: float = 1.0,
) -> ScoreTable:
    """`rank` every group, from the last to the first, by the kept outputs of its readers.

    `rank` gets the stacked readers of b groups and returns b rankings. An output that is a unit of a group ranked
    earlier counts only if that unit is kept: if it is among the suggested number of highest scores, or without a
    suggestion among the `keep` share. Outputs of no group, or of a group ranked later (a residual stream is ranked with
    its first producer), always count. If none of a reader's outputs would count, all do, because surgery leaves every
    layer at least one.
    """
    modules = dict(model.named_modules())
    by_magnitude = score_magnitude(model, structures, moments, Magnitude(), seed=0).channels
    unkept: dict[str, set[int]] = {}  # by module: outputs
    rankings: dict[str, Ranking] = {}
    reasons: dict[str, str] = {}
    for run in _runs(structures, modules):
        observed = {group.name: _readers(group, modules, moments, unkept) for group in run}
        for names in _of_one_shape({name: readers for name, readers in observed.items() if readers}):
            stacks = zip(*(observed[name] for name in names), strict=True)
            rankings |= zip(names, rank([_stacked(readers) for readers in stacks]), strict=True)
        for group in run:
            if not observed[group.name]:
                reasons[group.name] = UNOBSERVED
                rankings[group.name] = Ranking(scores=by_magnitude[group.name])
            _note_(unkept, group, modules, rankings[group.name], keep)
    order = [group.name for group in structures.groups]
    return ScoreTable(
        scorer=scorer,
        channels={name: rankings[name].scores for name in order},
        suggested={name: asked for name in order if (asked := rankings[name].suggested) is not None},
        reasons={name: reasons[name] for name in order if name in reasons},
        is_cumulative=is_cumulative,
    )


def _runs(structures: Structures, modules: dict[str, nn.Module]) -> Iterator[list[ChannelGroup]]:
    """The groups from the last to the first, in runs: no reader of a group writes units of another in its run."""
    run: list[ChannelGroup] = []
    written: set[str] = set()
    for group in reversed(structures.groups):
        if any(member.module in written and reads(modules[member.module], member.side) for member in group.members):
            yield run
            run, written = [], set()
        run.append(group)
        written.update(m.module for m in group.members if writes(modules[m.module], m.side))
    yield run


def _of_one_shape(observed: dict[str, list[Reader]]) -> Iterator[list[str]]:
    """The names of groups whose readers can be stacked, in lists of up to `_MAX_VALUES` values."""
    by_shape: dict[str, list[str]] = {}
    for name, readers in observed.items():
        shape = str([(reader.weights.shape, reader.regressors) for reader in readers])
        by_shape.setdefault(shape, []).append(name)
    for names in by_shape.values():
        size = max(1, _MAX_VALUES // max(reader.covariance.numel() for reader in observed[names[0]]))
        yield from (names[start : start + size] for start in range(0, len(names), size))


def of_one_shape(readers: Sequence[Reader]) -> list[Reader]:
    """The readers of the same b groups with r of one shape as one each: (*) becomes (r, b), `modules` has r * b."""
    by_shape: dict[str, list[Reader]] = {}
    for reader in readers:
        by_shape.setdefault(str((reader.weights.shape, reader.regressors)), []).append(reader)
    found = []
    for alike in by_shape.values():
        size = max(1, _MAX_VALUES // alike[0].covariance.numel())
        for start in range(0, len(alike), size):
            some = alike[start : start + size]
            part, shape = _stacked(some), (len(some), *some[0].covariance.shape[:-2])
            found.append(
                replace(
                    part,
                    covariance=part.covariance.view(*shape, *part.covariance.shape[-2:]),
                    weights=part.weights.view(*shape, *part.weights.shape[-2:]),
                )
            )
    return found


def _stacked(readers: Sequence[Reader]) -> Reader:
    if len(readers) == 1:
        return readers[0]
    return Reader(
        modules=[module for reader in readers for module in reader.modules],
        covariance=torch.cat([reader.covariance for reader in readers]),
        weights=torch.cat([reader.weights for reader in readers]),
        outputs=[outputs for reader in readers for outputs in reader.outputs],
        regressors=readers[0].regressors,
    )


def _note_(
    unkept: dict[str, set[int]], group: ChannelGroup, modules: dict[str, nn.Module], ranking: Ranking, keep: float
) -> None:
    """Add the outputs that produce the removed units of `group`."""
    width = max(1, round(keep * group.num_units)) if ranking.suggested is None else ranking.suggested
    going = sorted(range(group.num_units), key=ranking.scores.__getitem__)[: group.num_units - width]
    for member in group.members:
        if writes(modules[member.module], member.side):
            unkept.setdefault(member.module, set()).update(i for unit in going for i in member.units[unit])


def _readers(
    group: ChannelGroup, modules: dict[str, nn.Module], moments: Moments, unkept: dict[str, set[int]]
) -> list[Reader]:
    found = []
    for member in group.members:
        if member.module in moments.inputs and reads(modules[member.module], member.side):
            layer: Any = modules[member.module]
            weights = weight_matrix(layer).detach().double()
            every = range(len(weights))
            outputs = [o for o in every if o not in unkept.get(member.module, ())] or list(every)
            found.append(
                Reader(
                    modules=[member.module],
                    covariance=moments.inputs[member.module].covariance.unsqueeze(0),
                    weights=weights[outputs].T.contiguous().unsqueeze(0),
                    outputs=[outputs],
                    regressors=[columns(unit, num_taps(layer)) for unit in member.units],
                )
            )
    return found


def remove_greedily(problems: Sequence[Removal], num_units: int) -> tuple[Tensor, Tensor]:
    """Repeatedly remove the unit with the smallest loss, summed over all problems: (order, losses on removal).

    The losses of a problem are (*, units), or (r, b, units) for r readers of each of b groups.
    """

    def remove_(unit: Tensor) -> None:
        for problem in problems:
            problem.remove_(unit)

    return take_greedily(lambda: [over_readers(problem.losses()) for problem in problems], remove_, num_units)


def over_readers(amounts: Tensor) -> Tensor:
    """Amounts (r, b, units) summed over the r readers; others as they are."""
    return amounts.sum(0) if amounts.dim() == 3 else amounts


def take_greedily(
    amounts: Callable[[], list[Tensor]], take_: Callable[[Tensor], None], num_units: int, *, greatest: bool = False
) -> tuple[Tensor, Tensor]:
    """Repeatedly take the unit of smallest (or greatest) summed amount: (order, amounts when taken).

    Amounts and results are stacked for several problems, (*, units); `take_` gets one unit per problem, (*).
    """
    order: list[Tensor] = []
    taken: list[Tensor] = []
    sign = -1.0 if greatest else 1.0
    for _ in range(num_units):
        now = torch.stack(amounts()).sum(0).nan_to_num(nan=0.0)
        gone = torch.zeros_like(now).scatter_(-1, torch.stack(order, dim=-1), torch.inf) if order else 0.0
        unit = (sign * now + gone).argmin(-1)
        order.append(unit)
        taken.append(now.gather(-1, unit.unsqueeze(-1)).squeeze(-1).clamp_min(0.0))
        take_(unit)
    return torch.stack(order, dim=-1), torch.stack(taken, dim=-1)


def cumulative(order: Tensor, amounts: Tensor) -> Tensor:
    """By unit, (*, units): the sum of all amounts up to its removal. Strictly rising in `order`."""
    totals = amounts.cumsum(-1) + STEP * torch.arange(amounts.shape[-1])
    return torch.empty_like(totals).scatter_(-1, order, totals)


def rankings_of(scores: Tensor) -> list[Ranking]:
    """Rankings from scores (b, units)."""
    return [Ranking(scores=tuple(row)) for row in scores.tolist()]
