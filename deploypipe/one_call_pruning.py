"""`deploypipe.prune`: a smaller network in one call, without a target, a search or a run folder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.data import as_pair, require_repeatable
from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.errors import BudgetError, ConfigError
from deploypipe.networks.batch_trees import map_tensors
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Mipp, Observe, Repair, Search
from deploypipe.records import PruningPlan, ScoreTable, Structures
from deploypipe.scoring import score
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.search.allocation.solver import (
    Allocation,
    Bound,
    allocate_to,
    allowed_widths,
    uniform,
    widest_within,
)
from deploypipe.search.cost_models.additive_costs import mac_costs
from deploypipe.target import parse_limit
from deploypipe.task import Batch, classification, forward, take_calib
from deploypipe.user_code_errors import wrap_forward_errors

_ONE_OF_BOTH = "give one of them: ratio=0.5 removes half of the channels of every group, macs='0.5x' halves the work"


@wrap_forward_errors()
def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    macs: str | None = None,
    calib: Iterable[Any] | None = None,
    keep: Sequence[str] = (),
    channel_multiple: int = 1,
) -> nn.Module:
    """Return a smaller copy of `model`, ready to fine-tune. `model` is not changed.

        >>> import torch, deploypipe
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> deploypipe.prune(model, torch.randn(2, 16), ratio=0.5)[0]
        Linear(in_features=16, out_features=32, bias=True)

    example_inputs: one batch, as `model` gets it: a tensor, or a tuple or dict of them.
    ratio: share of the channels (and heads) that every group loses. Inputs and outputs of the network stay whole.
    macs: instead of `ratio`, the most multiply-accumulates of one sample: "0.5x" of the dense network, or "60 M".
    calib: batches in any form that `deploypipe.data` reads. With them units are ranked by MIPP instead of by magnitude,
    and the layers left are solved by least squares to give the dense network's outputs again. With `macs` each group
    also gets the width that costs the outputs least, which takes several forward passes for each group. Targets are not
    trained on.
    keep: glob patterns of module names that stay whole. channel_multiple: widths stay multiples of it.

    `nn.MultiheadAttention` becomes a module that can lose heads. Raises ConfigError for arguments that do not fit,
    ModelError if nothing can be removed, DataError for unusable batches, BudgetError if `macs` is out of reach.
    """
    _check_arguments(ratio, macs, channel_multiple)
    plain = with_slim_attention(unwrapped(model))  # a copy
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    plain.cpu()
    dense = copied(plain).eval()
    inputs = _on_cpu(example_inputs)
    structures = list_structures(dense, inputs, keep)
    batches = None if calib is None else _read(calib)
    moments = observe_activations(dense, structures, batches, Observe()) if batches else None
    scores = score(dense, structures, moments, Mipp()) if moments else score_magnitudes(dense, structures)
    widths = _Widths(dense, inputs, structures, scores, channel_multiple)
    if ratio is not None:
        chosen = uniform(structures, 1 - ratio, channel_multiple)
    else:
        chosen = widths.within(_share_of_macs(macs or "", structures.num_macs), batches, moments)
    plan = widths.plan(chosen)
    pruned = apply_plan(plain, plan)
    if batches:
        pruned, _ = repair(dense, pruned, plan, batches, Repair())
    return pruned.to(device)


@dataclass(frozen=True, slots=True)
class _Widths:
    """The width of each group."""

    dense: nn.Module
    inputs: Any
    structures: Structures
    scores: ScoreTable
    channel_multiple: int

    def plan(self, chosen: Allocation) -> PruningPlan:
        return make_plan(self.structures, self.scores, chosen.widths, chosen.blocks, self.channel_multiple)

    def within(self, share: float, batches: Sequence[Batch] | None, moments: Moments | None) -> Allocation:
        """Widths whose multiply-accumulates are at most `share` of the dense network's."""
        if batches and moments:
            chosen = self._least_harmful(share, batches, moments)
        else:
            chosen = widest_within(self._uniform, lambda allocation: self._macs(allocation) <= share)
        if (least := self._macs(chosen)) > share:
            raise BudgetError(
                f"macs: {share:.3g}x of the dense network is out of reach, {least:.3g}x is the least that was found; "
                "ask for more, or keep fewer modules whole"
            )
        return chosen

    def _least_harmful(self, share: float, batches: Sequence[Batch], moments: Moments) -> Allocation:
        """By measured loss curves; no block is removed."""
        first, target = batches[0]
        with torch.no_grad():
            task = with_distillation_loss(classification(), forward(self.dense, first), target)
        curves = measure_curves(
            self.dense,
            self.structures,
            self.scores,
            moments,
            batches,
            Search(prune_blocks=False),
            channel_multiple=self.channel_multiple,
            distillation_loss=task.distillation_loss,
        )
        costs = mac_costs(self.structures, allowed_widths(self.structures, curves))
        bound = Bound(costs=costs, share=share)
        return allocate_to(self.structures, curves, [bound], lambda allocation: [self._macs(allocation)])

    def _uniform(self, fraction: float) -> Allocation:
        return uniform(self.structures, fraction, self.channel_multiple)

    def _macs(self, allocation: Allocation) -> float:
        """As a share of the dense network's, counted on the network that comes out."""
        return count_macs(apply_plan(self.dense, self.plan(allocation)), self.inputs)[1] / self.structures.num_macs


def _check_arguments(ratio: float | None, macs: str | None, channel_multiple: int) -> None:
    if (ratio is None) == (macs is None):
        raise ConfigError("prune", "ratio, macs", "are both given" if macs else "are both absent", _ONE_OF_BOTH)
    if ratio is not None and not 0 < ratio < 1:
        raise ConfigError("prune", "ratio", f"must be > 0 and < 1, got {ratio!r}", "0.5 removes half of the channels")
    if channel_multiple < 1:
        raise ConfigError(
            "prune", "channel_multiple", f"must be >= 1, got {channel_multiple!r}", "8 suits most devices"
        )


def _share_of_macs(macs: str, dense: int) -> float:
    try:
        return parse_limit("macs", macs).absolute(dense) / dense
    except ValueError as error:
        raise ConfigError("prune", "macs", *str(error).split("; ", 1)) from None


def _read(calib: Iterable[Any]) -> list[Batch]:
    """The samples for observation and repair. They are read once, so that a shuffled loader works too."""

    source = calib if isinstance(calib, Iterator) else require_repeatable(calib, "calib is a {}", "calib")

    def pairs() -> Iterator[Batch]:
        for inputs, target in map(as_pair, source):
            yield _on_cpu(inputs), _on_cpu(target)

    return take_calib(pairs(), max(Observe().num_samples, Repair().num_samples))


def _on_cpu(batch: Any) -> Any:
    return map_tensors(Tensor.cpu, batch)
