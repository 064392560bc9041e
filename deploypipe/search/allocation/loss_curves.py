"""Measure loss curves: how much cutting one structure alone changes the network's outputs.

Allocation by summed scores is worse than uniform widths; allocation by the measured change of the outputs is far
better. Scores decide which units of a group are removed, these curves decide how many.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.distillation_loss import kl_divergence_loss
from deploypipe.errors import DataError
from deploypipe.memory_order import find_order
from deploypipe.networks.model_copies import copied
from deploypipe.numerics.least_squares import solve_towards
from deploypipe.observe.calibration_pass import hooked
from deploypipe.observe.layer_regressions import (
    blocks_of_matrix,
    columns,
    from_blocks,
    has_channels_last,
    num_inputs,
    num_taps,
    reads,
    weight_matrix,
)
from deploypipe.observe.pass_statistics import InputMoments, Moments
from deploypipe.pruning.modules.bypass import Bypass
from deploypipe.pruning.modules.module_kinds import normalizes_over_channels
from deploypipe.pruning.surgery.module_masking import mask_
from deploypipe.pruning.surgery.module_slicing import cut_
from deploypipe.recipe import Search
from deploypipe.records import ChannelGroup, Curves, Edit, LossCurve, Notify, Progress, ScoreTable, Structures, silent
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import (
    Batch,
    DistillationLoss,
    evaluating,
    forward,
    num_samples,
    stack_alike,
    take_calib,
)

_RIDGE = 1e-3
# On images that a network has memorised its outputs are saturated: the KL at temperature 1 depends on a few of them.
# At a higher temperature every image contributes: better widths from the same number of images (pipelines/LOG.md).
TEMPERATURE = 4.0


def measure_curves(
    dense: nn.Module,
    structures: Structures,
    scores: ScoreTable,
    moments: Moments,
    batches: Sequence[Batch],
    settings: Search,
    *,
    channel_multiple: int = 1,
    distillation_loss: DistillationLoss | None = None,
    notify: Notify = silent,
) -> Curves:
    """Measure how far the outputs move with each group at several widths, and without each block.

    The distance is `distillation_loss` at `TEMPERATURE`; if None, the KL divergence of classes, in nats per sample.

    The cut is simulated on the dense network: removed inputs of the consumers are set to zero, which is what surgery
    does, and the consumers' weights are repaired in closed form from `moments`. Cost: one forward pass for each point;
    blocks that ran before the structure are not run again.
    """
    taken = take_calib(batches, settings.num_curve_samples)
    alike = stack_alike([batch for batch, _ in taken])
    probe = _Probe(
        dense, structures, list(map(find_order(dense, alike[0]), alike)), distillation_loss or kl_divergence_loss()
    )
    offered = unmeasured_curves(structures, settings, channel_multiple).curves
    groups = {group.name: group for group in structures.groups}
    curves: list[LossCurve] = []
    for curve in offered:
        if curve.kind == "block":
            losses = [probe.loss_without(curve.name)]
        else:
            losses = _group_losses(probe, groups[curve.name], curve.kept, scores, moments)
        curves.append(replace(curve, losses=tuple(losses)))
        notify(Progress(stage="curves", done=len(curves), total=len(offered), message=curve.name))
    return Curves(curves=tuple(curves), num_samples=sum(map(num_samples, alike)))


def unmeasured_curves(structures: Structures, settings: Search, channel_multiple: int) -> Curves:
    """The curves of `measure_curves` with losses of 0: the possible choices are known before calibration."""
    curves = []
    for group in structures.groups:
        least, step = structures.least_width(group, channel_multiple), group.step(channel_multiple)
        kept = (*width_levels(group.num_units, settings.num_levels, step, least), group.num_units)
        curves.append(LossCurve(name=group.name, kind="channels", kept=kept, losses=(0.0,) * len(kept)))
    if settings.prune_blocks:
        curves += [LossCurve(name=block.name, kind="block", kept=(0,), losses=(0.0,)) for block in structures.blocks]
    return Curves(curves=tuple(curves), num_samples=0)


def _group_losses(
    probe: "_Probe", group: ChannelGroup, widths: Sequence[int], scores: ScoreTable, moments: Moments
) -> list[float]:
    ranked = sorted(range(group.num_units), key=lambda i: (-scores.channels[group.name][i], i))
    return [probe.loss_at(group, ranked[:width], moments) if width < group.num_units else 0.0 for width in widths]


def width_levels(num_units: int, count: int, multiple: int, least: int = 1) -> list[int]:
    """At most `count` widths from `least` to below `num_units`, evenly spread multiples of `multiple`, ascending."""
    steps = list(range(-(-least // multiple) * multiple, num_units, multiple))
    if len(steps) <= count:
        return steps
    return sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})


class _Part:
    """Samples of one shape: the inputs, and the dense network's outputs."""

    def __init__(self, inputs: Any) -> None:
        self.inputs, self.count = inputs, num_samples(inputs)
        self.block_outputs: dict[str, Any] = {}
        self.dense_outputs: Any = None


class _Probe:
    """Runs the dense network with one structure cut and compares its outputs."""

    def __init__(
        self, dense: nn.Module, structures: Structures, groups: Sequence[Any], distillation_loss: DistillationLoss
    ) -> None:
        self.model, self.distillation_loss = dense, distillation_loss
        self.parts = [_Part(inputs) for inputs in groups]
        self.modules = dict(dense.named_modules())
        self.order = [block.name for block in structures.blocks]
        self.blocks = {block.name: Bypass(self.modules[block.name], block.returns) for block in structures.blocks}
        for part in self.parts:
            hooks = [(name, _keep_output(name, part)) for name in self.order]
            with evaluating(dense), torch.no_grad(), hooked(dense, hooks):
                part.dense_outputs = self._outputs(dense, part)

    def loss_at(self, group: ChannelGroup, kept: Sequence[int], moments: Moments) -> float:
        """The divergence with only the units `kept` of a group."""
        readers = [m for m in group.members if reads(self.modules[m.module], m.side)]
        if not readers or any(normalizes_over_channels(self.modules[m.module]) for m in group.members):
            return self._loss_cut(group, kept)
        with evaluating(self.model), torch.no_grad(), ExitStack() as stack:
            num_skipped = min(self._position(m.module) for m in group.members)
            for member in readers:
                layer = self.modules[member.module]
                gone = tuple(i for u in set(range(group.num_units)) - set(kept) for i in member.units[u])
                seen = moments.inputs.get(member.module)
                if seen is not None:  # it may read other groups' channels too (concatenation): they all stay
                    units = sorted(set(range(num_inputs(layer))) - set(gone))
                    stack.enter_context(_repaired(layer, columns(units, num_taps(layer)), seen))
                    continue
                stack.enter_context(_weights(layer, layer.weight.detach().clone()))
                mask_(self.model, [Edit(module=member.module, side=member.side, removed=gone)])
            return self._loss(self.model, num_skipped)

    def _loss_cut(self, group: ChannelGroup, kept: Sequence[int]) -> float:
        """Cut a copy, without repair, where masking the readers differs from surgery, as between layer norms."""
        gone = set(range(group.num_units)) - set(kept)
        smaller = copied(self.model)
        edits = [(m.module, m.side, {i for u in gone for i in m.units[u]}) for m in group.members]
        cut_(smaller, [Edit(module=name, side=side, removed=tuple(sorted(ids))) for name, side, ids in edits])
        with evaluating(smaller), torch.no_grad():
            return self._loss(smaller)

    def loss_without(self, block: str) -> float:
        """The divergence with a block replaced by the identity."""
        with evaluating(self.model), torch.no_grad(), ExitStack() as stack:
            stack.enter_context(_forward_as(self.modules[block], self.blocks[block].forward))
            return self._loss(self.model, self.order.index(block))

    def _position(self, module: str) -> int:
        """How many blocks are finished when `module` runs: a module inside block i needs blocks 0 .. i-1."""
        inside = [i for i, name in enumerate(self.order) if module.startswith(f"{name}.")]
        return inside[0] if inside else 0

    def _outputs(self, model: nn.Module, part: _Part) -> Any:
        outputs = forward(model, part.inputs)
        if not all(torch.isfinite(tensor).all() for tensor in name_outputs(outputs).values()):
            raise DataError("the network's outputs are not finite on the calibration samples; check data and model")
        return outputs.double() if isinstance(outputs, Tensor) else outputs

    def _loss(self, model: nn.Module, num_skipped: int = 0) -> float:
        """The mean over all samples. The first `num_skipped` blocks return what they returned in the dense network."""
        total = 0.0
        for part in self.parts:
            with ExitStack() as stack:
                for name in self.order[:num_skipped]:
                    output = part.block_outputs[name]
                    stack.enter_context(_forward_as(self.modules[name], lambda *_a, o=output, **_k: deepcopy(o)))
                outputs = self._outputs(model, part)
            total += part.count * float(self.distillation_loss(outputs, part.dense_outputs, TEMPERATURE))
        return max(total / sum(part.count for part in self.parts), 0.0)


def _keep_output(name: str, part: _Part) -> Callable[..., None]:
    def hook(_m: nn.Module, _a: tuple[Any, ...], output: Any) -> None:
        part.block_outputs[name] = deepcopy(output)  # the next module may work in place

    return hook


@contextmanager
def _forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # a patched module has its own
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _repaired(layer: Any, kept: Sequence[int], moments: InputMoments) -> Iterator[None]:
    """Set all input columns but `kept` to zero, and solve those to predict the dense output."""
    dense = weight_matrix(layer).double()
    index = torch.tensor(list(kept))
    covariance = moments.covariance
    cross = covariance[index] @ dense.T
    solution = solve_towards(covariance[index][:, index], cross, dense[:, index].T, _RIDGE).T
    weight = torch.zeros_like(dense)
    weight[:, index] = solution
    shift = (dense - weight) @ moments.mean
    shaped = shift.to(layer.weight.dtype)
    if not has_channels_last(layer):
        shaped = shaped.reshape(-1, *[1] * (layer.weight.dim() - 2))
    handle = layer.register_forward_hook(lambda _m, _i, output: output + shaped)
    try:
        with _weights(layer, from_blocks(layer, blocks_of_matrix(layer, weight)).to(layer.weight.dtype)):
            yield
    finally:
        handle.remove()


@contextmanager
def _weights(layer: Any, weight: Tensor) -> Iterator[None]:
    dense = layer.weight.data
    layer.weight.data = weight
    try:
        yield
    finally:
        layer.weight.data = dense
