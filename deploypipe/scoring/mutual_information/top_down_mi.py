"""From the outputs to the inputs: what a unit is worth is asked of those outputs of its readers that are kept.

The order of arXiv:2411.00147 and arXiv:2108.12594. Only groups with a reader whose inputs were observed can be ranked
so; the others are scored by magnitude. Groups of one shape that do not read into each other, such as those of a stage
of residual blocks, are ranked side by side: a step of a small group costs little but the calls.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deploypipe.observe.layer_regressions import columns, num_taps, reads, weight_matrix, writes
from deploypipe.observe.moments import Moments
from deploypipe.recipe import Magnitude
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scheduling.exclusive_measurement import give_way
from deploypipe.scoring.magnitude import score_magnitude

UNOBSERVED = "none of its consumers could be observed; scored by magnitude"
STEP = 1e-9  # keeps the order in which units were taken where nothing is lost or gained
_MAX_VALUES = 2**22  # of the covariances ranked side by side: what is larger gains nothing, and takes memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """An observed consumer of a group, with those m of its outputs that count as kept; of b groups side by side."""

    modules: list[str]  # b
    covariance: Tensor  # (b, p, p) float64, of all that it reads
    weights: Tensor  # (b, p, m) float64
    outputs: list[list[int]]  # the m outputs of each, in the module's own numbering
    regressors: list[list[int]]  # by unit of the group: which of the p


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """How one group's units are ordered."""

    scores: tuple[float, ...]  # by unit, higher = keep
    suggested: int | None = None  # how many the method itself would keep


class Removal(Protocol):
    """Units that can be taken away one by one."""

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
    """`rank` every group, from the last to the first, by what its readers' kept outputs need.

    `rank` is given the readers of b groups side by side, and returns b rankings. An output that is a unit of a group
    ranked before counts only if that unit is kept: if it is among the suggested number, or where nothing is suggested
    among the `keep` share, of highest score. Outputs of no group, or of a group whose turn comes later (a residual
    stream comes where its first producer does), always count. Should none of a reader's outputs count, all do, because
    surgery leaves every layer at least one.
    """
    modules = dict(model.named_modules())
    by_magnitude = score_magnitude(model, structures, moments, Magnitude(), seed=0).channels
    unkept: dict[str, set[int]] = {}  # by module: outputs
    rankings: dict[str, Ranking] = {}
    reasons: dict[str, str] = {}
    for run in _runs(structures, modules):
        observed = {group.name: _readers(group, modules, moments, unkept) for group in run}
        for names in _of_one_shape({name: readers for name, readers in observed.items() if readers}):
            together = zip(*(observed[name] for name in names), strict=True)
            rankings |= zip(names, rank([_side_by_side(readers) for readers in together]), strict=True)
            give_way()
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
    """The groups from the last to the first, cut where a reader of one writes units of another of the same run."""
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
    """The names of the groups, those together whose readers can be stacked, up to `_MAX_VALUES`."""
    by_shape: dict[str, list[str]] = {}
    for name, readers in observed.items():
        shape = str([(reader.weights.shape, reader.regressors) for reader in readers])
        by_shape.setdefault(shape, []).append(name)
    for names in by_shape.values():
        size = max(1, _MAX_VALUES // max(reader.covariance.numel() for reader in observed[names[0]]))
        yield from (names[start : start + size] for start in range(0, len(names), size))


def _side_by_side(readers: Sequence[Reader]) -> Reader:
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
    """Add the outputs that make the units of `group` that are not kept."""
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


def remove_one_by_one(problems: Sequence[Removal], num_units: int) -> tuple[Tensor, Tensor]:
    """Remove the unit whose loss, summed over all problems, is least, again and again: (order, losses on removal)."""

    def remove_(unit: Tensor) -> None:
        for problem in problems:
            problem.remove_(unit)

    return take_one_by_one(lambda: [problem.losses() for problem in problems], remove_, num_units)


def take_one_by_one(
    amounts: Callable[[], list[Tensor]], take_: Callable[[Tensor], None], num_units: int, *, greatest: bool = False
) -> tuple[Tensor, Tensor]:
    """Take the unit of least (or greatest) summed amount, again and again: (order, amounts when taken).

    Amounts, and what is returned, are those of problems side by side, (*, units); `take_` is given a unit of each, (*).
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
    """By unit, (*, units): the sum of all amounts up to its turn. Strictly rising in `order`."""
    totals = amounts.cumsum(-1) + STEP * torch.arange(amounts.shape[-1])
    return torch.empty_like(totals).scatter_(-1, order, totals)


def rankings_of(scores: Tensor) -> list[Ranking]:
    """Of scores (b, units)."""
    return [Ranking(scores=tuple(row)) for row in scores.tolist()]
