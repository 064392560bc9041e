"""Collect statistics during one pass: each collector hooks modules and adds up its sums after every batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.cka import HsicAccumulator, gram_of
from deploypipe.numerics.least_squares import GramSum, sum_of_products
from deploypipe.observe.layer_regressions import (
    LinearLike,
    PatchPlaces,
    geometry,
    has_channels_last,
    num_groups,
    num_inputs,
    num_taps,
    patch_places,
    read_patches,
    reads,
    real_positions,
    sample_positions,
    weight_matrix,
    within_groups,
)
from deploypipe.observe.pass_statistics import InputMoments
from deploypipe.records import ChannelGroup, Structures

Hook = tuple[str, Callable[..., None]]  # the module's name, and a hook that runs after its forward()
MAX_COLUMNS = 6144  # a layer that reads more (channels x taps) would need a moment matrix above 300 MiB
MAX_ROWS = 1024  # single samples kept of small statistics, so that memory does not grow with the data
BY_KEYWORD = "is called with its input as a keyword argument, which hooks do not see"
_ROWS_AT_ONCE = 512  # multiplied together: to add to a wide matrix costs as much as the products of some 50 rows
_CKA_SAMPLES = 48  # of each batch; the estimate does not depend on it in expectation


@dataclass(slots=True)
class Tokens:
    """The token mask of the current batch."""

    real: Tensor | None = None  # (n, tokens) bool, False for padding; None where all count


class InputCollector:
    """Input moments of every consumer of a prunable group, at sampled positions.

    Layers whose outputs have one size are read at the same positions. For a grouped convolution only moments within one
    group: no output reads two groups.
    """

    def __init__(
        self,
        structures: Structures,
        modules: dict[str, nn.Module],
        count: int,
        seed: int,
        tokens: Tokens,
        *,
        shuffled: bool,
    ) -> None:
        self.layers: dict[str, LinearLike] = {name: modules[name] for name in consumers(structures, modules)}
        widths = {name: num_inputs(layer) * num_taps(layer) for name, layer in self.layers.items()}
        self.skipped = {
            n: f"reads {width} values per position, more than {MAX_COLUMNS}"
            for n, width in widths.items()
            if width > MAX_COLUMNS
        }
        self.sums = {
            name: _Sum(name, widths[name], num_groups(self.layers[name]))
            for name in self.layers
            if name not in self.skipped
        }
        self.crosses = {name: _Cross() for name in self.sums} if shuffled else {}
        self.count, self.seed, self.tokens = count, seed, tokens
        self.generators: dict[torch.Size, torch.Generator] = {}  # by output size: draws do not depend on other layers
        self.positions: dict[torch.Size, Tensor] = {}  # of the current batch
        self.places: dict[tuple[Any, ...], PatchPlaces] = {}  # of the current batch

    def hooks(self) -> list[Hook]:
        return [(name, self._reader(name)) for name in self.sums]

    def _reader(self, name: str) -> Callable[..., None]:
        def read(module: LinearLike, args: tuple[Any, ...], output: Tensor) -> None:
            if not args:
                self.skipped[name] = BY_KEYWORD
                return
            places = self._places(module, args[0], output)
            rows = self.sums[name].room_(places.index.shape[:2].numel(), args[0])
            read_patches(module, args[0], places, out=rows)
            if name in self.crosses and len(output) > 1:
                others = (rows @ weight_matrix(module).detach().T).roll(places.index.shape[1], 0)  # the next sample's
                self.crosses[name].add_(rows, others)

        return read

    def _places(self, module: LinearLike, inputs: Tensor, output: Tensor) -> PatchPlaces:
        key = geometry(module, inputs, output)
        if key not in self.places:
            size = output.shape[:-1] if has_channels_last(module) else output.shape[:1] + output.shape[2:]
            if size not in self.positions:
                own = self.generators.setdefault(size[1:], torch.Generator().manual_seed(self.seed))
                self.positions[size] = sample_positions(module, output, self.count, own, self.tokens.real)
            self.places[key] = patch_places(module, inputs, output, self.positions[size])
        return self.places[key]

    def end_batch_(self) -> None:
        self.positions.clear()
        self.places.clear()

    def moments(self) -> dict[str, InputMoments]:
        return {name: total.moments() for name, total in self.sums.items() if total.count}

    def shuffled(self) -> dict[str, Tensor]:
        found = {name: cross.covariance() for name, cross in self.crosses.items() if cross.count}
        return {name: within_groups(self.layers[name], cross) for name, cross in found.items()}


class UnitCollector:
    """Each unit's mean over positions, sample by sample, at the input of the group's first reader."""

    def __init__(self, structures: Structures, modules: dict[str, nn.Module], tokens: Tokens) -> None:
        self.readers, self.tokens = first_readers(structures, modules), tokens
        self.rows: dict[str, list[Tensor]] = {group: [] for group in self.readers}
        self.labels: list[Tensor | None] = []

    def hooks(self) -> list[Hook]:
        return [(module, self._reader(group, units)) for group, (module, units) in self.readers.items()]

    def _reader(self, group: str, units: Tensor) -> Callable[..., None]:
        def read(module: LinearLike, args: tuple[Any, ...], output: Tensor) -> None:
            room = MAX_ROWS - sum(map(len, self.rows[group]))
            if room > 0 and args:
                real = None if self.tokens.real is None else self.tokens.real[:room]
                self.rows[group].append(pooled(module, args[0].detach()[:room], real)[:, units].mean(2).float())

        return read

    def end_batch_(self, target: Any) -> None:
        is_class = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
        self.labels.append(target.cpu().long() if is_class else None)

    def units(self) -> dict[str, Tensor]:
        return {group: torch.cat(rows) for group, rows in self.rows.items() if rows}

    def all_labels(self) -> Tensor | None:
        classes = [label for label in self.labels if label is not None]
        return torch.cat(classes)[:MAX_ROWS] if len(classes) == len(self.labels) else None


class BlockCollector:
    """HSIC between all block outputs, and rows of each block's inputs and outputs."""

    def __init__(self, structures: Structures, tokens: Tokens) -> None:
        self.tokens = tokens
        self.names = [block.name for block in structures.blocks]
        self.hsic = HsicAccumulator(len(self.names))
        self.grams: dict[str, Tensor] = {}  # of the current batch
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self.places: dict[tuple[int, int, bool], Tensor] = {}  # of the current batch
        self.seen = 0

    def hooks(self) -> list[Hook]:
        return [(name, self._reader(name)) for name in self.names]

    def _reader(self, name: str) -> Callable[..., None]:
        def read(_m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = output if isinstance(output, Tensor) else output[0]  # some blocks return a tuple
            value, real = output.detach()[:_CKA_SAMPLES], self._real(output)
            value = value if real is None else value.masked_fill(~real[: len(value)].to(value.device).unsqueeze(2), 0)
            self.grams[name] = gram_of(value.flatten(1))
            # A block that works in place may have overwritten its input, so rows of the input are taken earlier.
            self.outputs[name].append(self._rows(output.detach()))

        return read

    def pre_hooks(self) -> list[Hook]:
        def reader(name: str) -> Callable[..., None]:
            return lambda _m, args: self.inputs[name].append(self._rows(args[0].detach()))

        return [(name, reader(name)) for name in self.names]

    def _rows(self, value: Tensor) -> Tensor:
        """One position per sample, the same in all tensors of one size: (samples still needed, channels) float32."""
        real = self._real(value)
        value = value[: max(0, MAX_ROWS - self.seen)]
        is_map = value.dim() > 3  # (n, channels, ...); else (n, ..., channels)
        rows = value.flatten(2) if is_map else value.reshape(len(value), -1, value.shape[-1]).transpose(1, 2)
        return rows[torch.arange(len(rows)), :, self._places(len(rows), rows.shape[2], real)].float()

    def _places(self, num_samples: int, total: int, real: Tensor | None) -> Tensor:
        key = num_samples, total, real is not None
        if key not in self.places:
            generator = torch.Generator().manual_seed(self.seen)
            if real is None:
                self.places[key] = torch.randint(total, (num_samples,), generator=generator)
            else:
                self.places[key] = real_positions(real[:num_samples], 1, generator)[:, 0]
        return self.places[key]

    def _real(self, value: Tensor) -> Tensor | None:
        """The mask of positions of (n, tokens, channels) that count; None if all do."""
        real = self.tokens.real
        return real if real is not None and value.dim() == 3 and real.shape == value.shape[:2] else None

    def end_batch_(self, count: int) -> None:
        if self.names:
            self.hsic.add_([self.grams[name] for name in self.names])
        self.places.clear()
        self.seen += count

    def block_inputs(self) -> dict[str, Tensor]:
        return {name: torch.cat(self.inputs[name]) for name in self.names}

    def block_outputs(self) -> dict[str, Tensor]:
        return {name: torch.cat(self.outputs[name]) for name in self.names}


class GradientCollector:
    """Squared derivatives of each sample's loss: by a gate on every unit, and by every consumer's outputs.

    The gate's is Molchanov et al., arXiv:1906.10771 eq. 8, with the sum over all readers of a unit inside the square.
    """

    def __init__(self, structures: Structures, modules: dict[str, nn.Module]) -> None:
        self.groups = structures.groups
        self.consumers, self.modules = consumers(structures, modules), modules
        self.products: dict[str, Tensor] = {}  # (n, input channels) of the batch at hand
        self.gates = {g.name: torch.zeros(g.num_units, dtype=torch.float64) for g in structures.groups}
        self.fisher: dict[str, Tensor] = {}
        self.seen: set[str] = set()

    def hooks(self) -> list[Hook]:
        return [(name, self._reader(name)) for name in self.consumers]

    def _reader(self, name: str) -> Callable[..., None]:
        def read(module: LinearLike, args: tuple[Any, ...], output: Tensor) -> None:
            if not args:
                return
            values = args[0].detach().clone()  # later modules may overwrite it before the derivatives come
            channel = -1 if has_channels_last(module) else 1

            def by_input(gradient: Tensor) -> None:
                product = (gradient * values).movedim(channel, -1)
                self.products[name] = product.reshape(len(product), -1, product.shape[-1]).double().sum(1)

            def by_output(gradient: Tensor) -> None:
                rows = gradient.movedim(channel, -1)
                squares = rows.reshape(-1, rows.shape[-1]).double().square().sum(0)
                self.fisher[name] = self.fisher.get(name, 0) + squares

            if args[0].requires_grad:
                args[0].register_hook(by_input)
            output.register_hook(by_output)  # type: ignore[no-untyped-call]

        return read

    def end_batch_(self) -> None:
        for group in self.groups:
            total: Tensor | None = None
            for member in group.members:
                if member.module in self.products and reads(self.modules[member.module], member.side):
                    product = self.products[member.module]
                    unit = torch.stack([product[:, list(indices)].sum(1) for indices in member.units], dim=1)
                    total = unit if total is None else total + unit
            if total is not None:
                self.gates[group.name] += total.square().sum(0).cpu()
                self.seen.add(group.name)
        self.products.clear()

    def mean_gates(self, count: int) -> dict[str, Tensor]:
        return {name: total / count for name, total in self.gates.items() if name in self.seen}

    def mean_fisher(self, count: int) -> dict[str, Tensor]:
        return {name: total / count for name, total in self.fisher.items()}


def consumers(structures: Structures, modules: dict[str, nn.Module]) -> list[str]:
    """The layers that read a prunable group, in module order."""
    members = [member for group in structures.groups for member in group.members]
    names = {member.module for member in members if reads(modules[member.module], member.side)}
    return [name for name in modules if name in names]


def first_readers(structures: Structures, modules: dict[str, nn.Module]) -> dict[str, tuple[str, Tensor]]:
    """Group -> its first linear-like consumer, and the consumer's indices of each unit, (units, width)."""

    def of(group: ChannelGroup) -> tuple[str, Tensor] | None:
        for member in group.members:
            if reads(modules[member.module], member.side):
                return member.module, torch.tensor(member.units)
        return None

    found = {group.name: of(group) for group in structures.groups}
    return {name: reader for name, reader in found.items() if reader is not None}


def pooled(module: LinearLike, inputs: Tensor, real: Tensor | None = None) -> Tensor:
    """The module's input averaged over positions (for tokens, over the `real` ones): (n samples, channels)."""
    if not has_channels_last(module):
        return inputs.flatten(2).mean(2)
    rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if real is None or inputs.dim() != 3 or real.shape != inputs.shape[:2]:
        return rows.mean(1)
    real = real.to(rows.device)
    return rows.masked_fill(~real.unsqueeze(2), 0).sum(1) / real.sum(1, keepdim=True).clamp_min(1)


@dataclass(slots=True)
class _Sum:
    """Running sums around a shift (the first rows' mean), so that a large mean costs no digits.

    Products between columns of different groups are left out.
    """

    name: str  # of the layer
    width: int  # p
    groups: int
    count: int = 0
    num_waiting: int = 0  # rows that are not in the sums yet
    waiting: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (at least so many, p)
    shift: Tensor | None = None  # (p,)
    first: Tensor = field(default_factory=lambda: torch.zeros(()))  # (p,) float64
    second: GramSum = field(default_factory=GramSum)  # (p, p), or (groups, p / groups, p / groups)

    def room_(self, count: int, like: Tensor) -> Tensor:
        """The next rows (count, p), which the caller must write before the next call."""
        if self.num_waiting + count > len(self.waiting):
            self._sum_()
            if count > len(self.waiting):
                size = max(count, _ROWS_AT_ONCE)
                self.waiting = torch.empty(size, self.width, dtype=like.dtype, device=like.device)
        self.num_waiting += count
        self.count += count
        return self.waiting[self.num_waiting - count : self.num_waiting]

    def _sum_(self) -> None:
        if not self.num_waiting:
            return
        rows = self.waiting[: self.num_waiting]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.num_waiting = 0
        if self.shift is None:
            self.shift = rows.mean(0)
            self.first = torch.zeros(self.width, dtype=torch.float64, device=rows.device)
        rows -= self.shift
        self.first += rows.sum(0)
        if not torch.isfinite(self.first).all():
            seen = f"{self.name}: NaN or infinity in its input on the calibration samples"
            raise DataError(f"{seen}; check data and weights")
        self.second.add_(rows if self.groups == 1 else rows.view(len(rows), self.groups, -1).movedim(1, 0))

    def moments(self) -> InputMoments:
        """The moments of all rows. Ends the sums: nothing can be added later."""
        self._sum_()
        self.waiting = self.waiting.new_empty(0, 0)
        assert self.shift is not None
        mean, products = self.first / self.count, self.second.total().div_(self.count)
        if self.groups == 1:
            covariance = products.addr_(mean, mean, alpha=-1)
        else:
            by_group = mean.view(self.groups, -1)
            products.baddbmm_(by_group.unsqueeze(2), by_group.unsqueeze(1), alpha=-1)
            covariance = torch.block_diag(*products)  # type: ignore[no-untyped-call]
        return InputMoments(mean=mean + self.shift, covariance=covariance, num_rows=self.count)


@dataclass(slots=True)
class _Cross:
    """Running covariance between two kinds of rows; every batch is centred on its own means."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add_(self, x: Tensor, y: Tensor) -> None:
        self.total = self.total + sum_of_products(x - x.mean(0), y - y.mean(0))
        self.count += len(x)

    def covariance(self) -> Tensor:
        return self.total / self.count
