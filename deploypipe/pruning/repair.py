"""Sequential least-squares repair: no gradients, one forward pass.

The pruned network runs over the calibration samples. Whenever a layer has computed its output, its weights are first
solved so that, on the inputs it really gets in the pruned network, it gives what the dense network gives; then the run
goes on with the corrected output. Where the output is added to a shortcut, the target is the dense sum minus the pruned
shortcut, so that errors of the shortcut are corrected too and do not pile up with depth.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deploypipe.errors import DataError
from deploypipe.numerics.least_squares import CrossMoments, Fit
from deploypipe.observe.patches import (
    Mixer,
    is_mixer,
    sample_inputs,
    sample_outputs,
    sample_positions,
    weight_matrix,
)
from deploypipe.observe.stream import hooked
from deploypipe.recipe import Repair
from deploypipe.records import Event, Progress, PruningPlan, RepairReport, RepairRow, silent
from deploypipe.task import Batch, channels_last, forward, num_samples, stack_batches, take_calib

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_NEGLIGIBLE = 1e-7  # relative squared error that float32 rounding alone can make
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(slots=True)
class _Path:
    """Where a layer's output stops being an affine function of its weights."""

    layer: str
    norm: str | None = None  # the batch norm that reads it
    is_added: bool = False  # then it ends as an operand of an addition
    num_calls: int = 0


# finish(path, the layer's input, the value at the path's end, the addition's other operand) -> the value to go on with
_Finish = Callable[[_Path, Tensor, Tensor, Tensor | None], Tensor]


def repair(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Batch],
    settings: Repair,
    *,
    seed: int = 0,
    notify: Progress = silent,
) -> tuple[nn.Module, RepairReport]:
    """A copy of `pruned` whose layers' weights are solved to give the dense network's outputs again.

    Cost: two forward passes over at most `settings.num_samples` samples (held in memory as one batch) and one solve a
    layer. Every layer after the first change is solved, also those that were not cut: they correct what arrives wrong.
    A solution that does not lower the layer's error is not written. Layers whose input was not cut and that feed no
    addition are solved too. Labels are not used.
    """
    taken = take_calib(batches, settings.num_samples)
    inputs = channels_last(stack_batches([batch for batch, _ in taken]))
    repaired = copy.deepcopy(pruned).eval()
    teacher = copy.deepcopy(dense).eval()
    kept_outputs = {e.module: set(e.removed) for e in plan.edits if e.side == "out"}
    names = _layers_to_solve(repaired, plan)
    few = stack_batches([batch for batch, _ in take_calib(taken, 2)])
    paths = _common(_find_paths(repaired, names, few), _find_paths(teacher, names, few))
    sampler = _Sampler(settings.positions_per_sample, seed, teacher)
    targets = _dense_targets(teacher, paths, sampler, kept_outputs, inputs)
    rows: list[RepairRow] = []
    modules = dict(repaired.named_modules())

    def solve(path: _Path, layer_input: Tensor, value: Tensor, other: Tensor | None) -> Tensor:
        layer, norm = modules[path.layer], modules[path.norm] if path.norm else None
        positions = sampler.positions(path.layer, value, layer)
        current = sample_outputs(layer, value, positions)
        target = targets.pop(path.layer)
        if other is not None:
            target = target - sample_outputs(layer, other.expand_as(value), positions)
        patches = sample_inputs(layer, layer_input, value, positions)
        row, is_solved = _solve_layer_(path.layer, layer, norm, patches, target, current, settings.ridge)
        rows.append(row)
        notify(Event(stage="repair", done=len(rows), total=len(paths), message=path.layer))
        if not is_solved:
            return value
        output: Tensor = layer.forward(layer_input)
        if norm is not None:
            output = norm.forward(output)
        return output

    with torch.no_grad(), _watching(repaired, paths, solve):
        forward(repaired, inputs)
    for module, original in zip(repaired.modules(), pruned.modules(), strict=True):
        module.training = original.training
    return repaired, RepairReport(rows=tuple(rows), num_samples=num_samples(inputs))


def _layers_to_solve(model: nn.Module, plan: PruningPlan) -> list[str]:
    untouched = not plan.blocks and not plan.edits
    return [] if untouched else [n for n, m in model.named_modules() if is_mixer(m)]


def _find_paths(model: nn.Module, names: Sequence[str], inputs: Any) -> dict[str, _Path]:
    """Follow each layer's output object through a batch norm into an addition, in one small forward pass."""
    paths = {name: _Path(layer=name) for name in names}
    norm_calls: Counter[str] = Counter()
    trace = _FindAdditions(list(names))

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _i: tuple[Any, ...], output: Tensor) -> None:
            paths[name].num_calls += 1
            trace.follow(paths[name], output)

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            norm_calls[name] += 1
            before = trace.find(args[0])
            if before is not None and before.path.norm is None and _is_per_output(model, before.path, output):
                before.path.norm = name
                trace.follow(before.path, output)

        return hook

    hooks = [(n, layer_hook(n)) for n in names] + _norm_hooks(model, norm_hook)
    with hooked(model, hooks), torch.no_grad(), trace:
        forward(model, inputs)
    for step in trace.steps:  # whoever else reads a tensor must find in it what was there before
        if step.num_uses > 1:
            step.path.is_added = False
            step.path.norm = step.path.norm if step.is_after_norm else None
    for path in paths.values():
        if path.norm is not None and norm_calls[path.norm] > 1:
            path.norm, path.is_added = None, False
    return {name: path for name, path in paths.items() if path.num_calls == 1}


def _common(paths: dict[str, _Path], others: dict[str, _Path]) -> dict[str, _Path]:
    """Paths as far as they are the same in both networks: without a removed block, others may begin."""
    for name, path in paths.items():
        other = others.get(name, _Path(layer=name))
        if path.norm != other.norm:
            path.norm, path.is_added = None, False
        path.is_added = path.is_added and other.is_added
    return {name: path for name, path in paths.items() if name in others}


@dataclass(slots=True)
class _Step:
    """A tensor on a path; holding it keeps its id unique, its version tells whether it was changed in place since."""

    path: _Path
    tensor: Tensor
    is_after_norm: bool
    version: int
    num_uses: int = 0


class _FindAdditions(TorchFunctionMode):
    """Marks the paths that end in an addition, and counts who reads the tensors on them."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order
        self.steps: list[_Step] = []
        self.by_id: dict[int, _Step] = {}

    def follow(self, path: _Path, tensor: Tensor) -> None:
        step = _Step(path, tensor, path.norm is not None, tensor._version)
        self.steps.append(step)
        self.by_id[id(tensor)] = step

    def find(self, tensor: Any) -> _Step | None:
        step = self.by_id.get(id(tensor))
        return step if step is not None and tensor._version == step.version else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [a for each in given if isinstance(each, (list, tuple)) for a in each]
        read = [(a, step) for a in given if (step := self.find(a)) is not None]
        if read and _is_plain_sum(func, args, kwargs):
            # Of two branches the one computed last absorbs the other's error.
            max((step.path for _, step in read), key=lambda path: self.order.index(path.layer)).is_added = True
        result = func(*args, **(kwargs or {}))
        for tensor, step in read:
            step.num_uses += result is not tensor and isinstance(result, (Tensor, list, tuple))
        return result


def _is_plain_sum(func: Any, args: Any, kwargs: Any) -> bool:
    """Two tensors of one shape, without a factor."""
    if getattr(func, "__name__", "") not in _ADDITIONS or kwargs or len(args) != 2:
        return False
    return all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape


def _is_per_output(model: nn.Module, path: _Path, output: Tensor) -> bool:
    """Whether the axis that a batch norm works on is the layer's outputs."""
    return output.dim() == 2 or not isinstance(model.get_submodule(path.layer), nn.Linear)


def _norm_hooks(model: nn.Module, hook: Callable[[str], Callable[..., Any]]) -> list[tuple[str, Callable[..., Any]]]:
    """On the batch norms that can hold a solution."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
    return [(name, hook(name)) for name, m in norms.items() if m.affine and m.running_mean is not None]


@contextmanager
def _watching(model: nn.Module, paths: dict[str, _Path], finish: _Finish) -> Iterator[None]:
    """Call `finish` at the end of each path while the block runs, and go on with what it returns."""
    carried: dict[int, tuple[_Path, Tensor, Tensor]] = {}

    def layer_hook(path: _Path) -> Callable[..., Tensor]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if path.norm is None and not path.is_added:
                return finish(path, args[0], output, None)
            carried[id(output)] = (path, args[0], output)
            return output

        return hook

    def norm_hook(name: str) -> Callable[..., Tensor]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if id(args[0]) not in carried or carried[id(args[0])][0].norm != name:
                return output
            path, layer_input, _ = carried.pop(id(args[0]))
            if not path.is_added:
                return finish(path, layer_input, output, None)
            carried[id(output)] = (path, layer_input, output)
            return output

        return hook

    hooks = [(name, layer_hook(path)) for name, path in paths.items()] + _norm_hooks(model, norm_hook)
    with hooked(model, hooks), _AtAdditions(carried, finish):
        yield


class _AtAdditions(TorchFunctionMode):
    """Ends the paths whose output is added to something."""

    def __init__(self, carried: dict[int, tuple["_Path", Tensor, Tensor]], finish: "_Finish") -> None:
        super().__init__()
        self.carried, self.finish = carried, finish

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_plain_sum(func, args, kwargs):
            args = list(args)
            for here, there in ((0, 1), (1, 0)):
                if id(args[here]) in self.carried:
                    path, layer_input, value = self.carried.pop(id(args[here]))
                    args[here] = self.finish(path, layer_input, value, args[there])
        return func(*args, **(kwargs or {}))


class _Sampler:
    """The same output positions of a layer in the dense and in the pruned network."""

    def __init__(self, count: int, seed: int, model: nn.Module) -> None:
        self.count, self.seed = count, seed
        self.order = {name: number for number, (name, _) in enumerate(model.named_modules())}

    def positions(self, name: str, output: Tensor, layer: Mixer) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.order[name])
        return sample_positions(layer, output, self.count, generator)


def _dense_targets(
    teacher: nn.Module, paths: dict[str, _Path], sampler: _Sampler, removed: dict[str, set[int]], inputs: Any
) -> dict[str, Tensor]:
    """What the dense network has at the end of each path: (rows, outputs kept), by layer."""
    modules = dict(teacher.named_modules())
    targets: dict[str, Tensor] = {}

    def record(path: _Path, _input: Tensor, value: Tensor, other: Tensor | None) -> Tensor:
        layer = modules[path.layer]
        total = value if other is None else value + other
        rows = sample_outputs(layer, total, sampler.positions(path.layer, value, layer))
        kept = [i for i in range(rows.shape[1]) if i not in removed.get(path.layer, set())]
        targets[path.layer] = rows[:, kept]
        return value

    with torch.no_grad(), _watching(teacher, paths, record):
        forward(teacher, inputs)
    return targets


def _solve_layer_(
    name: str, layer: Mixer, norm: nn.Module | None, patches: Tensor, target: Tensor, current: Tensor, ridge: float
) -> tuple[RepairRow, bool]:
    """Regress `target` on `patches` and write the solution into the layer (and its batch norm).

    patches: (rows, inputs * taps), target and current: (rows, outputs). The regression has an intercept where there is
    a bias or a batch norm to hold it. Errors are relative to the target's variance.
    """
    moments = CrossMoments.of(patches, target)
    if not moments.is_finite:
        raise DataError(f"{name}: activations are not finite on the calibration samples; check the data and the model")
    variance = float(moments.output_variance.sum().clamp_min(1e-30))
    before = float((target - current).square().sum(dtype=torch.float64)) / len(target) / variance
    if before < _NEGLIGIBLE:
        return RepairRow(module=name, error_before=before, error_after=before, reason="nothing to repair"), False
    scale = _output_scale(norm)
    prior = weight_matrix(layer).double().T * (1.0 if scale is None else scale)
    has_intercept = norm is not None or layer.bias is not None
    fit = moments.fit(prior, ridge, has_intercept=has_intercept)
    after = fit.squared_error / variance
    if not after < before:
        return RepairRow(module=name, error_before=before, error_after=before, reason="no solution lowers it"), False
    with torch.no_grad():
        if norm is not None:
            _write_before_norm_(layer, norm, fit)
        else:
            layer.weight.copy_(fit.coefficients.T.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(fit.intercept)
    return RepairRow(module=name, error_before=before, error_after=after), True


def _output_scale(norm: Any) -> Tensor | None:
    if norm is None:
        return None
    gain = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
    scale: Tensor = gain.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.detach()


def _write_before_norm_(layer: Mixer, norm: Any, fit: Fit) -> None:
    """Write the solution, its scale and its intercept in the batch norm.

    The norm gets the true statistics of `layer(x)`, so that the network computes the same with batch statistics
    (training) as with running ones. Each output's weights keep the length they had: behind a batch norm that length
    changes nothing but the size of a training step (van Laarhoven, arXiv:1706.05350). The solution's own lengths, which
    hold the gain of the norm, are 0.007 to 18 times those on ResNet-56, and a fine-tune of it forgot the repair.
    """
    solved = fit.coefficients.T  # (outputs, inputs * taps)
    length, solved_length = weight_matrix(layer).double().norm(dim=1), solved.norm(dim=1)
    scale = torch.where((length > 0) & (solved_length > 0), length / solved_length, 1.0)
    layer.weight.copy_((solved * scale[:, None]).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.zero_()
    variance = fit.product_variance * scale.square()
    norm.running_mean.copy_(fit.product_mean * scale)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt() / scale)
    norm.bias.copy_(fit.product_mean + fit.intercept)
