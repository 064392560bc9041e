"""The user's task: data splits, loss, metric and optional functions, and helpers for batches of any structure."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deploypipe.data import as_pair
from deploypipe.errors import DataError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.batch_trees import Leaf, leaves, map_leaves, same_value, structure, tensors

# (inputs, target). inputs: a tensor, or a nested tuple, list or mapping of tensors and values. forward() gets a mapping
# by name, a tuple or list by position.
Batch: TypeAlias = tuple[Any, Any]
Slices: TypeAlias = Callable[[Any, Any], dict[str, Tensor]]
DistillationLoss: TypeAlias = Callable[[Any, Any, float], Tensor]  # (outputs, expected, temperature) -> scalar
MakeOptimizer: TypeAlias = Callable[[nn.Module], Optimizer]
MakeSchedule: TypeAlias = Callable[[Optimizer, int], LRScheduler]  # (optimizer, number of steps in all)
TrainingStep: TypeAlias = Callable[[nn.Module, Batch, Any], Tensor]  # (model, batch, the dense outputs or None) -> loss
RealTokens: TypeAlias = Callable[[Any], Tensor]  # inputs -> (n, tokens) bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Four sources of batches, as `deploypipe.data` reads them; each can be iterated many times.

    calib: statistics, repair and loss curves (labels unused). train: fine-tuning. val: every choice. test: the final
    figures, never a choice. calib, val and test must give the same batches in the same order every time.
    """

    calib: Iterable[Any]
    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """loss(outputs, target) -> scalar; metric(outputs, target) -> one value per sample, higher is better.

    The reported accuracy is the mean of `metric` over a split, as a fraction.

    real_tokens(inputs) -> bool (n, tokens): False marks padding, which statistics and repair leave out. A dict's
    "attention_mask" is used by default.

    slices(inputs, target) -> named parts of the batch, bool (n,) each. A budget can limit the drop of each slice
    (`slice_drop_pp`).

    distillation_loss(outputs, the dense network's outputs, temperature) -> scalar: how far the outputs are apart, in
    the unit of `loss`. Fine-tuning and loss curves use it. The default is chosen from a batch: KL divergence for
    integer targets, relative squared error for all others (`deploypipe.distillation_loss`).

    optimizer(model) -> torch optimizer, schedule(optimizer, number of steps) -> LRScheduler, stepped after each batch:
    replace those of `recipe().finetune`. training_step(model, batch, teacher_outputs) -> scalar: replaces the loss of
    fine-tuning, for a task that needs more than `loss(outputs, target)`. It calls `model` once, with the inputs of the
    batch, and returns the mean over its samples. teacher_outputs: the dense network's for these inputs; None if
    `finetune.distil_weight` is 0. Such samples are not mixed.
    """

    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any, Any], Tensor]
    name: str = "accuracy"
    real_tokens: RealTokens | None = None
    class_names: tuple[str, ...] = ()  # in the order of a classifier's outputs; they go into the exported file
    slices: Slices | None = None
    distillation_loss: DistillationLoss | None = None
    optimizer: MakeOptimizer | None = None
    schedule: MakeSchedule | None = None
    training_step: TrainingStep | None = None


def find_logits(outputs: Any) -> Tensor | None:
    """The logits among a network's outputs: the only tensor, or the one called `logits`; None without either.

    The outputs of `transformers` have one of that name, next to hidden states and others.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = tensors(outputs)
    return found[0] if len(found) == 1 else None


def require_logits(outputs: Any) -> Tensor:
    """The logits (n, classes) that `classification()` reads; DataError if these outputs have none."""
    logits = find_logits(outputs)
    if logits is None or logits.dim() < 2 or logits.shape[1] < 2:
        found = f"shape {['n', *logits.shape[1:]]}" if logits is not None else _kinds_of(outputs)
        raise DataError(
            f"classification() needs logits, one tensor of shape [n, classes], but the network returns {found}; "
            "return Task(loss=..., metric=...) from task(), with a loss and a metric for these outputs"
        )
    return logits


def _kinds_of(outputs: Any) -> str:
    held = ", ".join(leaf.place for leaf in leaves(outputs, "") if isinstance(leaf.value, Tensor))
    return f"a {type(outputs).__name__} of {held}" if held else f"a {type(outputs).__name__}"


def _is_correct(outputs: Any, target: Tensor) -> Tensor:
    hits: Tensor = require_logits(outputs).argmax(dim=1) == target
    return hits.to(torch.float32)


def classification() -> Task:
    """Cross-entropy and top-1 accuracy, for logits (n, classes) and integer labels (n,); a slice for each class.

    The network may return the logits alone, or as `logits` among other outputs, as those of `transformers` do.
    """
    return Task(loss=_cross_entropy, metric=_is_correct, name="top-1 accuracy", slices=_by_class)


def _cross_entropy(outputs: Any, target: Tensor) -> Tensor:
    """Torch's cross-entropy, for labels of any integer type."""
    return F.cross_entropy(require_logits(outputs), target if target.is_floating_point() else target.long())


def is_classification(task: Task) -> bool:
    """Whether the task came from `classification()`, also if its functions were wrapped since."""
    return inspect.unwrap(task.metric) is _is_correct


def _by_class(inputs: Any, target: Tensor) -> dict[str, Tensor]:
    return {f"class {label}": target == label for label in sorted(set(target.tolist()))}


def find_slices(batches: Iterable[Batch], slices: Slices | None) -> dict[str, tuple[int, ...]]:
    """The indices of a split's samples in each slice."""
    found: dict[str, list[int]] = {}
    start = 0
    for inputs, target in batches if slices else ():
        for name, mask in slices(inputs, target).items() if slices else ():
            if mask.shape != (num_samples(inputs),):
                raise DataError(
                    f"task().slices returned a tensor of shape {tuple(mask.shape)} for slice {name!r} of "
                    f"{num_samples(inputs)} samples; return one bool for each sample"
                )
            found.setdefault(name, []).extend((start + mask.nonzero().flatten()).tolist())
        start += num_samples(inputs)
    return {name: tuple(found[name]) for name in sorted(found)}


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call `model` on one batch of inputs, packed in any way. See `without_caches` for what is left out."""
    args, kwargs = as_arguments(inputs)
    return without_caches(model(*args, **kwargs))


def without_caches(outputs: Any) -> Any:
    """The outputs without caches of `transformers` (keys and values of past tokens): state, and not tensors."""
    caches = [key for key, value in outputs.items() if _is_cache(value)] if isinstance(outputs, Mapping) else []
    if not caches:
        return outputs
    kept = {key: value for key, value in outputs.items() if key not in caches}
    kind: Any = type(outputs)
    return kind(**kept) if is_dataclass(outputs) else kept


def _is_cache(value: Any) -> bool:
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for forward(): a mapping by name, a tuple or list by position, anything else as the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def num_samples(inputs: Any) -> int:
    """The batch size: the first axis of the tensor with the most dimensions (the first such tensor, if several).

    It decides which members of a batch have a batch axis: the tensors whose first axis has that size. All others
    (tensors of another size or without dimensions, numbers, flags, text, None) belong to the whole batch, not to single
    samples. DataError if no tensor has a dimension.
    """
    size = batch_size_of([tuple(tensor.shape) for tensor in tensors(inputs)])
    if size is None:
        raise DataError(
            f"a batch has no tensor with a batch axis, it holds {_described(inputs)}; give samples as tensors whose "
            "first axis is the batch"
        )
    return size


def batch_size_of(shapes: Iterable[tuple[int, ...]]) -> int | None:
    """The batch size by the rule of `num_samples`, from the shapes of a batch's members in their order."""
    widest = max(shapes, key=len, default=())
    return widest[0] if widest else None


def _described(inputs: Any) -> str:
    return ", ".join(f"{leaf.place} = {type(leaf.value).__name__}" for leaf in leaves(inputs)) or "nothing"


def has_batch_axis(value: Any, size: int) -> bool:
    """Whether a member of a batch of `size` samples has one row for each sample; see `num_samples`."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def map_samples(function: Callable[[Tensor], Tensor], values: Any, size: int | None = None) -> Any:
    """Apply `function` to each tensor with a batch axis in inputs (or targets); all else is kept.

    size: the batch size, because targets alone may not show it; by default that of `values`.
    """
    size = num_samples(values) if size is None else size
    return map_leaves(lambda leaf: function(leaf) if has_batch_axis(leaf, size) else leaf, values)


def take(inputs: Any, end: int, start: int = 0) -> Any:
    """Samples `start` to `end` (excluded) of a batch's inputs."""
    return map_samples(lambda tensor: tensor[start:end], inputs)


def take_batch(batch: Batch, end: int, start: int = 0) -> Batch:
    """Samples `start` to `end` (excluded) of a batch, inputs and target."""
    inputs, target = batch
    size = num_samples(inputs)
    return take(inputs, end, start), map_samples(lambda tensor: tensor[start:end], target, size)


def cut_batches(batches: Sequence[Batch], max_samples: int) -> list[Batch]:
    """The batches, with those of more than `max_samples` samples cut in pieces."""
    return [
        take_batch(batch, start + max_samples, start)
        for batch in batches
        for start in range(0, num_samples(batch[0]), max_samples)
    ]


def find_real_tokens(inputs: Any, real_tokens: RealTokens | None) -> Tensor | None:
    """(n, tokens) bool, False for padding, from `Task.real_tokens` or an "attention_mask"; None without either."""
    if real_tokens is not None:
        mask = real_tokens(inputs)
        if mask.dim() != 2 or len(mask) != num_samples(inputs):
            raise DataError(
                f"task().real_tokens returned a tensor of shape {tuple(mask.shape)} for {num_samples(inputs)} samples; "
                "return one of shape (samples, tokens), False for padding"
            )
        return mask.bool()
    given = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


def repeat_samples(model: nn.Module, inputs: Any, count: int) -> Any:
    """Repeat the batch until it has at least `count` samples that `model` accepts in evaluation mode.

    In a batch of one sample, a tensor with one row may belong to the sample or to the whole batch. If the network
    rejects the batch with all of them repeated, each one in turn is left as it is, then all but the widest.
    """
    size = num_samples(inputs)
    if size == 0:
        raise DataError("the first batch has no samples; give at least one sample in each batch")
    if size >= count:
        return inputs
    places = [leaf.place for leaf in leaves(inputs) if has_batch_axis(leaf.value, size)]
    narrow = [leaf.place for leaf in leaves(inputs) if has_batch_axis(leaf.value, 1) and leaf.value.dim() < 2]
    kept_ones = [[], *([place] for place in narrow), narrow] if size == 1 and narrow else [[]]
    repeats = -(-count // size)
    for kept in kept_ones:
        repeated = _repeated(inputs, {place for place in places if place not in kept}, repeats)
        if len(kept_ones) == 1 or _accepts(model, repeated):
            return repeated
    return _repeated(inputs, set(places), repeats)


def _repeated(inputs: Any, places: set[str], repeats: int) -> Any:
    own = iter([leaf.place for leaf in leaves(inputs)])
    return map_leaves(lambda leaf: torch.cat([leaf] * repeats) if next(own) in places else leaf, inputs)


def _accepts(model: nn.Module, inputs: Any) -> bool:
    with evaluating(model), torch.no_grad():
        try:
            forward(model, copy.deepcopy(inputs))
        except Exception as error:  # the user's forward() may raise anything on shapes it is not written for
            raise_if_exhausted(error)
            return False
    return True


def first_of(batches: Iterable[Batch], split: str) -> Batch:
    """The first batch of a split, as a pair; DataError if it has none."""
    for batch in batches:
        return as_pair(batch, split)
    raise empty_split(split)


def count_batches(batches: Iterable[Batch]) -> int:
    """The number of batches. Reads all of them if their source has no length, like a loader of a stream."""
    length = known_length(batches)
    return sum(1 for _ in batches) if length is None else length


def known_length(batches: Iterable[Batch]) -> int | None:
    """The number of batches; None if their source has no length, like a DataLoader over an IterableDataset."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def empty_split(split: str) -> DataError:
    """The error for a split without batches."""
    return DataError(f"the {split} split is empty; return at least one batch as `{split}` from load_data()")


def take_calib(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` samples of the calibration split as pairs, in its own batches; fewer if it is smaller.

    DataError if it is empty.
    """
    taken: list[Batch] = []
    for batch in map(as_pair, batches):
        left = count - sum(num_samples(i) for i, _ in taken)
        if left <= 0:
            break
        taken.append(take_batch(batch, left))
    if not taken:
        raise empty_split("calib")
    return taken


def stack_alike(inputs: Sequence[Any]) -> list[Any]:
    """Stack inputs whose samples have equal shapes: one batch for each shape."""
    return [stack_batches(group) for group in group_alike(inputs)]


def group_alike(inputs: Sequence[Any], max_samples: int | None = None) -> list[list[Any]]:
    """Group inputs whose samples have equal shapes, so that `stack_batches` can stack each group.

    max_samples: of a group; larger batches are cut.
    """
    groups: list[list[Any]] = []
    if max_samples is not None:
        inputs = [
            take(each, start + max_samples, start)
            for each in inputs
            for start in range(0, num_samples(each), max_samples)
        ]
    for each in inputs:
        fitting = (group for group in groups if _can_be_one(group[0], each) and _has_room(group, each, max_samples))
        group = next(fitting, None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


def _has_room(group: Sequence[Any], each: Any, max_samples: int | None) -> bool:
    return max_samples is None or sum(map(num_samples, (*group, each))) <= max_samples


def _can_be_one(one: Any, other: Any) -> bool:
    sizes = num_samples(one), num_samples(other)
    pairs = list(zip(leaves(one), leaves(other), strict=False))
    return structure(one) == structure(other) and all(
        a.value.shape[1:] == b.value.shape[1:]
        if has_batch_axis(a.value, sizes[0]) and has_batch_axis(b.value, sizes[1])
        else is_same(a.value, b.value)
        for a, b in pairs
    )


def stack_batches(inputs: Sequence[Any]) -> Any:
    """Stack several batches of inputs into one.

    DataError, with the place in the batch, if members have different shapes, or belong to the whole batch and differ
    between batches.
    """
    rows = [list(leaves(each)) for each in inputs]
    sizes = [num_samples(each) for each in inputs]
    if len({structure(each) for each in inputs}) > 1:
        raise DataError("batches hold different members; give the same members in the same order in each batch")
    stacked = iter([_stacked(column, sizes) for column in zip(*rows, strict=True)])
    return map_leaves(lambda _: next(stacked), inputs[0])


def _stacked(column: Sequence[Leaf], sizes: Sequence[int]) -> Any:
    values = [leaf.value for leaf in column]
    if all(has_batch_axis(value, size) for value, size in zip(values, sizes, strict=True)):
        if len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(sorted({str(tuple(value.shape[1:])) for value in values})[:3])
            raise DataError(
                f"{column[0].place} has samples of several shapes ({shapes}), which do not fit in one batch; pad them "
                "to one shape"
            )
        return torch.cat(values)
    if all(is_same(values[0], value) for value in values[1:]):
        return values[0]
    raise DataError(
        f"{column[0].place} belongs to the whole batch and differs between batches; give one value for each sample (a "
        "tensor whose first axis is the batch), or the same value in every batch"
    )


def is_same(one: Any, other: Any) -> bool:
    """Whether two members of batches are equal: tensors by shape, type and values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return same_value(one, other)


def channels_last(inputs: Any) -> Any:
    """Images (4 dimensions) in the channels-last memory order, the fastest on CPUs and tensor cores; all else as is."""
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the training flag of every module is given back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
