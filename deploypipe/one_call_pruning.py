"""`deploypipe.prune`: a smaller network in one call, without a target, a search or a run folder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.compute_device import CPU
from deploypipe.data import as_pair, require_repeatable
from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.errors import BudgetError, ConfigError, DataError, ModelError
from deploypipe.memory_budget import allowed_bytes
from deploypipe.networks.batch_trees import leaves, map_tensors
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.fit_to_memory import fit_repair
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.plan_on_module import leave_plan_
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Constraints, Mipp, Observe, Repair, Search
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
from deploypipe.task import Batch, classification, evaluating, forward, take, take_calib
from deploypipe.task_result_checks import kind_of
from deploypipe.text.field_bounds import shown
from deploypipe.user_code_errors import wrap_forward_errors, wrap_user_errors

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
    constraints: Constraints | None = None,
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
    keep: glob patterns of modules that stay whole: they keep their outputs, and all inputs that they read.
    channel_multiple: widths stay multiples of it.
    constraints: what stays at least. `Constraints(least={"fc": 1.0})` keeps the outputs of `fc`, but not its inputs.

    The plan is left on the module as `pruning_plan`, plain data that `save_pruned` writes.

    `nn.MultiheadAttention` becomes a module that can lose heads. Raises ConfigError for arguments that do not fit,
    ModelError if nothing can be removed or forward() fails on `example_inputs`, DataError for unusable batches,
    BudgetError if `macs` is out of reach.
    """
    _check_arguments(ratio, macs, channel_multiple, keep)
    plain = with_slim_attention(unwrapped(model))  # a copy
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    plain.cpu()
    dense = copied(plain).eval()
    inputs = _on_cpu(example_inputs)
    _try_forward(dense, inputs)
    structures = list_structures(dense, inputs, keep, constraints)
    batches = None if calib is None else _read(calib)
    moments = observe_activations(dense, structures, batches, Observe()) if batches else None
    scores = score(dense, structures, moments, Mipp()) if moments else score_magnitudes(dense, structures)
    widths = _Widths(dense, inputs, structures, scores, channel_multiple)
    if ratio is not None:
        chosen = uniform(structures, 1 - ratio, channel_multiple)
    else:
        chosen = widths.within(_share_of_macs(macs, structures.num_macs), batches, moments)
    plan = widths.plan(chosen)
    _require_removal(plan, structures, channel_multiple)
    pruned = apply_plan(plain, plan)
    if batches:
        fit = fit_repair(dense, batches, Repair(), allowed_bytes(None, CPU))
        pruned, _ = repair(dense, pruned, plan, batches, Repair(), fit=fit)
    leave_plan_(pruned, plan)
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
                "ask for more, keep fewer modules whole, or lower channel_multiple"
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


def _check_arguments(ratio: Any, macs: Any, channel_multiple: Any, keep: Any) -> None:
    """Check what can be known before the network is traced. The types are those that users pass."""
    if (ratio is None) == (macs is None):
        problem = "are both absent" if macs is None else "are both given"
        raise ConfigError("prune", "ratio, macs", problem, _ONE_OF_BOTH)
    if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < 1):
        problem = f"must be > 0 and < 1, got {shown(ratio)}"
        raise ConfigError("prune", "ratio", problem, "0.5 removes half of the channels")
    if macs is not None:
        _check_macs(macs)
    if not isinstance(channel_multiple, int) or channel_multiple < 1:
        problem = f"must be a whole number >= 1, got {shown(channel_multiple)}"
        raise ConfigError("prune", "channel_multiple", problem, "8 suits most devices")
    if isinstance(keep, str):
        raise ConfigError("prune", "keep", f"must be a list of patterns, got {shown(keep)}", f"write keep=[{keep!r}]")


def _check_macs(macs: Any) -> None:
    if not isinstance(macs, str):
        is_share = isinstance(macs, int | float) and 0 < macs < 1
        remedy = f"for that share of the dense network's write macs='{macs}x'" if is_share else "write that"
        raise ConfigError("prune", "macs", f"must be text such as '0.5x' or '20 M', got {shown(macs)}", remedy)
    try:
        limit = parse_limit("macs", macs)
    except ValueError as error:
        raise ConfigError("prune", "macs", *str(error).split("; ", 1)) from None
    if limit.is_relative and limit.value >= 1:
        raise _not_smaller(macs)


def _share_of_macs(macs: str | None, dense: int) -> float:
    share = parse_limit("macs", macs or "").absolute(dense) / dense
    if share >= 1:
        raise _not_smaller(f"{macs} ({share:.3g}x)")
    return share


def _not_smaller(asked: str) -> ConfigError:
    problem = f"must be below the dense network's, got {asked}, which removes nothing"
    return ConfigError("prune", "macs", problem, "'0.5x' halves the work")


def _require_removal(plan: PruningPlan, structures: Structures, channel_multiple: int) -> None:
    """Raise ConfigError if the plan leaves the dense network as it is."""
    if any(cut.removed for cut in plan.cuts):
        return
    widest = max(group.num_units for group in structures.groups) if structures.groups else 0
    problem = f"nothing is removed: the widest group has {widest} units"
    if channel_multiple > 1:
        remedy = "lower it, loosen constraints, or remove more"
        raise ConfigError("prune", "channel_multiple", f"with {channel_multiple} {problem}", remedy)
    raise ConfigError("prune", "ratio", problem, "remove more, or loosen constraints")


def _try_forward(model: nn.Module, inputs: Any) -> None:
    """Run the network on one sample. ModelError names the layer that fails."""
    running = [""]
    handles: list[Any] = []

    def leave(*_: Any) -> None:
        running.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with evaluating(model), torch.no_grad():
            forward(model, take(inputs, 1))
    except Exception:  # whatever forward() raises
        layer = f"{running[-1]!r} ({type(model.get_submodule(running[-1])).__name__}) of " if running[-1] else ""
        what = f"{layer}the network, called with one sample of example_inputs ({_described(inputs)}),"
        with wrap_user_errors(what, "give example_inputs of the shape and type that forward() takes", ModelError):
            raise
    finally:
        for handle in handles:
            handle.remove()


def _described(inputs: Any) -> str:
    return ", ".join(kind_of(leaf.value) for leaf in leaves(inputs)) or kind_of(inputs)


def _read(calib: Iterable[Any]) -> list[Batch]:
    """The samples for observation and repair. They are read once, so that a shuffled loader works too."""

    source = calib if isinstance(calib, Iterator) else require_repeatable(calib, "calib is a {}", "calib")

    def pairs() -> Iterator[Batch]:
        for inputs, target in map(as_pair, source):
            yield _on_cpu(inputs), _on_cpu(target)

    batches = pairs()
    first = next(batches, None)
    if first is None:
        raise DataError("prune: calib yields no batches; give at least one batch of (inputs, targets)")
    return take_calib(chain([first], batches), max(Observe().num_samples, Repair().num_samples))


def _on_cpu(batch: Any) -> Any:
    return map_tensors(Tensor.cpu, batch)
