"""One streaming pass over the calibration samples: all that scores and loss curves need, nothing stored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.cka import HsicAccumulator
from deploypipe.numerics.least_squares import sum_of_products
from deploypipe.observe.patches import Mixer, is_mixer, num_taps, sample_inputs, sample_positions
from deploypipe.recipe import Observe
from deploypipe.records import Event, Progress, Structures, silent
from deploypipe.task import Batch, evaluating, forward, num_samples, take_calib

MAX_COLUMNS = 6144  # a layer that reads more (channels x taps) would need a moment matrix above 300 MiB
_CKA_SAMPLES = 64  # of each batch; the estimate does not depend on it in expectation


@dataclass(frozen=True, kw_only=True, slots=True)
class InputMoments:
    """What one layer reads: mean (p,) and covariance (p, p) of its input patches, float64, p = channels * taps."""

    mean: Tensor
    covariance: Tensor
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """The outcome of `observe`."""

    inputs: dict[str, InputMoments]  # by consumer module
    skipped: dict[str, str]  # consumers without moments, and why
    block_names: tuple[str, ...]
    block_cka: Tensor  # (blocks, blocks) unbiased linear CKA of the block outputs
    num_samples: int


def observe(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    settings: Observe,
    *,
    seed: int = 0,
    notify: Progress = silent,
) -> Moments:
    """Second moments of what every consumer of a prunable group reads, and CKA between block outputs.

    One forward pass over at most `settings.num_samples` samples; memory does not grow with their number. The model
    comes back as it was: hooks removed, training flag restored, buffers untouched (eval mode). Raises DataError for an
    empty split and for activations that are not finite, naming the layer.
    """
    taken = take_calib(batches, settings.num_samples)
    modules = dict(model.named_modules())
    names = _consumers(structures, modules)
    too_wide = {n for n in names if _columns(modules[n]) > MAX_COLUMNS}
    sums = {n: _Sum() for n in names if n not in too_wide}
    blocks = [block.name for block in structures.blocks]
    similarity = HsicAccumulator(len(blocks))
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def read_input(name: str) -> Callable[..., None]:
        def hook(module: Mixer, args: tuple[Any, ...], output: Tensor) -> None:
            positions = sample_positions(module, output, settings.positions_per_sample, generator)
            sums[name].add_(sample_inputs(module, args[0], output, positions), name)

        return hook

    def read_output(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _a: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = output[:_CKA_SAMPLES].flatten(1).clone()  # the next module may work in place

        return hook

    hooks = [(n, read_input(n)) for n in sums] + [(n, read_output(n)) for n in blocks]
    with hooked(model, hooks), evaluating(model), torch.no_grad():
        for number, (inputs, _) in enumerate(taken, start=1):
            forward(model, inputs)
            if blocks:
                similarity.add_([outputs[name] for name in blocks])
            notify(Event(stage="observe", done=number, total=len(taken)))
    return Moments(
        inputs={name: total.moments() for name, total in sums.items() if total.count},
        skipped={n: f"reads {_columns(modules[n])} values a position; more than {MAX_COLUMNS}" for n in too_wide},
        block_names=tuple(blocks),
        block_cka=similarity.cka(),
        num_samples=sum(num_samples(inputs) for inputs, _ in taken),
    )


def save_moments(moments: Moments, path: Path) -> None:
    """The tensors of `moments` as one safetensors file."""
    flat = {"block_cka": moments.block_cka}
    for name, one in moments.inputs.items():
        flat |= {f"mean:{name}": one.mean, f"covariance:{name}": one.covariance}
        flat[f"rows:{name}"] = torch.tensor(one.num_rows)
    meta = {f"skipped:{n}": reason for n, reason in moments.skipped.items()}
    meta |= {"blocks": "\n".join(moments.block_names), "num_samples": str(moments.num_samples)}
    flat |= {f"meta:{key}": torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in meta.items()}
    save_file(flat, path)


def load_moments(path: Path) -> Moments:
    """The inverse of `save_moments`."""
    flat = load_file(path)
    meta = {k.removeprefix("meta:"): bytes(v.tolist()).decode() for k, v in flat.items() if k.startswith("meta:")}
    names = [key.removeprefix("mean:") for key in flat if key.startswith("mean:")]
    return Moments(
        inputs={
            n: InputMoments(mean=flat[f"mean:{n}"], covariance=flat[f"covariance:{n}"], num_rows=int(flat[f"rows:{n}"]))
            for n in names
        },
        skipped={k.removeprefix("skipped:"): v for k, v in meta.items() if k.startswith("skipped:")},
        block_names=tuple(meta["blocks"].split("\n")) if meta["blocks"] else (),
        block_cka=flat["block_cka"],
        num_samples=int(meta["num_samples"]),
    )


@dataclass(slots=True)
class _Sum:
    """Running sums about a shift (the first batch's mean), so that no digits are lost to a large mean."""

    count: int = 0
    shift: Tensor | None = None
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add_(self, rows: Tensor, name: str) -> None:
        if self.shift is None:
            self.shift = rows.mean(0)
        centred = rows - self.shift
        self.first = self.first + centred.sum(0, dtype=torch.float64)
        self.second = self.second + sum_of_products(centred, centred)
        self.count += len(rows)
        if not torch.isfinite(self.first).all():
            raise DataError(f"{name}: reads NaN or infinity on the calibration samples; check data and weights")

    def moments(self) -> InputMoments:
        assert self.shift is not None
        mean = self.first / self.count
        return InputMoments(
            mean=mean + self.shift,
            covariance=self.second / self.count - torch.outer(mean, mean),
            num_rows=self.count,
        )


def _consumers(structures: Structures, modules: dict[str, nn.Module]) -> list[str]:
    names = {m.module for group in structures.groups for m in group.members if m.side == "in"}
    return [name for name, module in modules.items() if name in names and is_mixer(module)]


def _columns(module: Any) -> int:
    return int(module.weight.shape[1]) * num_taps(module)


@contextmanager
def hooked(model: nn.Module, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on the named modules, removed when the block ends."""
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
