"""Score blocks by MI-PRUN (arXiv:2601.07212) in closed Gaussian form: how much of its output the input explains.

The output of a residual block is always similar to its input. So plain information hardly separates blocks, and it
grows with the stream's variance. The importance is the share of the output's own information (above a noise floor) that
a linear map of the input does not explain, in [0, 1]. Information does not depend on which linear map it is; repair can
put one into the layers that read the block. The paper leaves the estimator and the choice between overlapping runs
open; both are ours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache

from torch import nn

from deploypipe.numerics.gaussian_information import principal_rows, redundancy
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import BlockMi
from deploypipe.records import BlockRanking, Names, Structures
from deploypipe.scoring.blocks.block_families import families
from deploypipe.task import Batch

Lost = Callable[[Names], float]  # the loss from removing a run of neighbouring blocks


def rank_by_information(
    model: nn.Module, structures: Structures, moments: Moments, batches: Iterable[Batch], config: BlockMi, seed: int
) -> BlockRanking:
    """1 - redundancy of each block's output given its input."""
    lost = _information_lost(moments, config.noise)
    return BlockRanking(scorer=config.kind, importance={b.name: lost((b.name,)) for b in structures.blocks})


def choose_blocks(structures: Structures, moments: Moments, config: BlockMi, count: int) -> Names:
    """The `count` blocks to remove, by the loss over whole runs; all if there are fewer."""
    lost = _information_lost(moments, config.noise)
    return fast_block_select(families(structures, moments), lost, count, config.num_exact)


def fast_block_select(parts: Sequence[Names], lost: Lost, count: int, num_exact: int) -> Names:
    """Fast-Block-Select: start with the `count` least important blocks, and exchange whole runs while that loses less.

    Each round looks for as many runs of the same lengths among the chosen blocks and the `count` next ones. Those with
    the smallest sums of single losses are scored exactly, and the best that do not overlap are taken. By the data
    processing inequality a run has no more information than any member, I(first in; last out) <= I(in; out): the sum
    only orders candidates. Every round lowers the exact loss, so it ends. Cost: `num_exact` scores per run and round.
    """
    single = {name: lost((name,)) for names in parts for name in names}
    ranked = sorted(single, key=lambda name: single[name])

    def total(chosen: AbstractSet[str]) -> float:
        return sum(map(lost, _runs(parts, chosen)))

    chosen = frozenset(ranked[:count])
    while True:
        spare = [name for name in ranked if name not in chosen][:count]
        lengths = sorted(map(len, _runs(parts, chosen)), reverse=True)
        other = _conflict_free(_runs(parts, chosen.union(spare)), lengths, single, lost, num_exact)
        if len(other) < len(chosen) or total(other) >= total(chosen):
            return tuple(name for name in single if name in chosen)
        chosen = other


def _conflict_free(
    allowed: Sequence[Names], lengths: Iterable[int], single: Mapping[str, float], lost: Lost, num_exact: int
) -> frozenset[str]:
    """The best run of each length that shares no block with earlier runs; fewer runs if none is left."""
    taken: frozenset[str] = frozenset()
    for length in lengths:
        windows = [run[i : i + length] for run in allowed for i in range(len(run) - length + 1)]
        free = [window for window in windows if taken.isdisjoint(window)]
        free.sort(key=lambda window: sum(single[name] for name in window))
        if free:
            best: Names = min(free[:num_exact], key=lost)
            taken = taken.union(best)
    return taken


def _runs(parts: Sequence[Names], chosen: AbstractSet[str]) -> list[Names]:
    """The longest runs of neighbours within one family that are all in `chosen`."""
    runs: list[Names] = []
    for names in parts:
        is_open = False
        for name in names:
            if name in chosen:
                runs.append((*runs.pop(), name) if is_open else (name,))
            is_open = name in chosen
    return runs


def _information_lost(moments: Moments, noise: float) -> Lost:
    inputs = {name: principal_rows(rows) for name, rows in moments.block_inputs.items()}
    outputs = {name: principal_rows(rows) for name, rows in moments.block_outputs.items()}

    @cache
    def lost(run: Names) -> float:
        return 1 - redundancy(inputs[run[0]], outputs[run[-1]], noise)

    return lost
