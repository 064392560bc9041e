"""A network that does not fit into memory twice, pruned one block after the other.

The weights stay in their file. One block at a time is read, observed, scored, cut, repaired and written, on what the
dense blocks before it give. Beside it runs what the pruned ones give: repair starts from that, so errors are corrected
on the way (as GPTQ does it for rounding, arXiv:2210.17323, section 3.3). Both streams lie on disk between two blocks.
What ties blocks together stays: the width of their common stream, and each block as a whole.
"""

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deploypipe.errors import ConfigError, DataError, ModelError, RunFolderError
from deploypipe.jsonio import from_json, to_json
from deploypipe.observe.stream import observe
from deploypipe.pruning.apply import apply_plan
from deploypipe.pruning.plan import make_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.saved import own_weights, save_parts
from deploypipe.pruning.structures import fingerprint_of, list_structures, model_fingerprint
from deploypipe.recipe import Recipe
from deploypipe.records import Edit, Event, GroupCut, Progress, PruningPlan, RepairRow, Structures, silent
from deploypipe.runs import digest, write_atomically
from deploypipe.scoring import needs_derivatives, score
from deploypipe.search.allocate import uniform
from deploypipe.task import Batch, forward, take, tensors
from deploypipe.weights import WeightFiles, streamed, without_weights

_WORK, _ABOUT = ".work", "about.json"  # in the folder, until the network is whole
_KINDS = ("dense", "pruned")
_BLOCK = "block"  # its name within the module that stands around it


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedBlock:
    """What became of one block; names are those of the whole network."""

    block: str
    cuts: tuple[GroupCut, ...]
    edits: tuple[Edit, ...]
    repair: tuple[RepairRow, ...]
    params_before: int
    params_after: int
    error: float  # behind it, of the pruned stream: squared, relative to the variance of the dense one
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseResult:
    """What `prune_blockwise` did; the network is in its folder."""

    plan: PruningPlan
    blocks: tuple[PrunedBlock, ...]
    params_before: int
    params_after: int


def prune_blockwise(
    build_model: Callable[[], nn.Module],
    weights: Path | str,
    batches: Sequence[Batch],
    folder: Path | str,
    recipe: Recipe,
    *,
    kept: float,
    channel_multiple: int = 1,
    blocks: Sequence[str] = (),
    notify: Progress = silent,
) -> BlockwiseResult:
    """Keep the share `kept` of every group of units and heads inside the blocks, and save what is left.

    build_model: its parameters are made without memory, and what it loads into them is dropped. weights: a
    `.safetensors` file, or the index of several. batches: calibration samples, all of one length. recipe: its score,
    observe, repair and seed count. blocks: names of modules of which each reads what the one before gives; by default
    the longest list of modules of one class. `load_pruned(folder, build_model)` is the pruned network.

    Memory: a few times one block, its second moments, and what one of its layers does with the samples of
    `recipe.repair` at once. The same call goes on where a killed one was. Raises ConfigError for a share or a score
    that cannot be used, ModelError where the blocks do not feed one another or the file has not their weights,
    DataError for samples of several lengths, RunFolderError where the folder holds something else.
    """
    _check_settings(recipe, kept)
    folder, files = Path(folder), WeightFiles(Path(weights))
    with without_weights():
        model = build_model().eval()
    names = tuple(blocks) or find_blocks_in_a_row(model)
    for name in set(names) - dict(model.named_modules()).keys():
        raise ModelError(f"the network has no module {name!r} (blocks=...); see named_modules()")
    fingerprint = fingerprint_of(files.tensors_of(model))
    settings = [names, kept, channel_multiple, recipe.score, recipe.observe, recipe.repair, recipe.seed]
    work = _Work(folder, {"model": fingerprint, "data": _digest_of(batches), "settings": digest(settings)})
    entry = _enter(model, files, names, batches)
    pruner = _Pruner(entry, recipe, kept, channel_multiple)
    done = work.finished(len(names))
    for number, name in enumerate(names):
        if number == len(done):
            block = deepcopy(model.get_submodule(name))
            files.load_(block, f"{name}.")
            row, pruned, streams = pruner.prune(name, block, work.streams(number) if number else None)
            work.finish(number, row, {f"{name}.{key}": value for key, value in own_weights(pruned).items()}, streams)
            done.append(row)
        notify(Event(stage="blocks", done=number + 1, total=len(names), message=_summary(done[number])))
    plan = PruningPlan(
        model_fingerprint=fingerprint,
        cuts=tuple(cut for row in done for cut in row.cuts),
        edits=tuple(edit for row in done for edit in row.edits),
        blocks=(),
    )
    save_parts(folder, plan, [*work.parts(len(names)), work.write_rest(files, model, names)])
    work.remove()
    before = sum(p.numel() for p in model.parameters())
    after = before - sum(row.params_before - row.params_after for row in done)
    return BlockwiseResult(plan=plan, blocks=tuple(done), params_before=before, params_after=after)


def find_blocks_in_a_row(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules in the longest list of modules of one class; of equally long ones, the first."""
    lists = [
        tuple(f"{name}.{child}" if name else child for child, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module.children()}) == 1
    ]
    longest = max(lists, key=len, default=())
    if len(longest) < 2:
        raise ModelError("the network has no list of blocks of one class; name them (blocks=...), in order")
    return longest


def _check_settings(recipe: Recipe, kept: float) -> None:
    if not 0 < kept < 1:
        raise ConfigError("prune_blockwise", "kept", f"{kept!r} is no share of units to keep", "write 0 < kept < 1")
    if needs_derivatives(recipe.score):
        remedy = "take one that needs no loss, as output_error, mipp or magnitude"
        raise ConfigError("the recipe", "score.kind", f"{recipe.score.kind!r} needs the whole network at once", remedy)


def _digest_of(batches: Sequence[Batch]) -> str:
    return digest([digest(value.tolist()) for inputs, _ in batches for value in tensors(inputs)])


# --- what the blocks are called with ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """How all blocks are called."""

    leaves: list[Any]  # arguments that are the same in all calls; None at the places of the others
    places: tuple[int, ...]  # of the stream, and of what else differs between samples
    spec: pytree.TreeSpec

    def __deepcopy__(self, _: Any) -> "_Form":
        return self  # nothing changes it, and copies of a block need none of their own

    def call(self, block: nn.Module, values: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, value in zip(self.places, values, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return block(*args, **kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """The calls of the first block, one for each batch: what flows from block to block, and what all of them get."""

    form: _Form
    stream: list[Tensor]  # (samples, ...) of each batch: the first tensor that the block is called with
    varying: list[tuple[Tensor, ...]]  # of each batch, other tensors with a row for each sample
    targets: list[Any]

    def batches(self, stream: list[Tensor]) -> list[Batch]:
        """Each batch's inputs of a block that stands alone."""
        inputs = [(own, *others) if others else own for own, others in zip(stream, self.varying, strict=True)]
        return list(zip(inputs, self.targets, strict=True))


class _Alone(nn.Module):
    """A block as a network of its own: its inputs are the stream, and what else differs between samples."""

    def __init__(self, block: nn.Module, form: _Form) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, *values: Tensor) -> Tensor:
        return _stream_of(self.form.call(self.block, values))


def _stream_of(outputs: Any) -> Tensor:
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    if not isinstance(first, Tensor):
        raise ModelError(f"a block gives {type(first).__name__} first, and no tensor that the next one could read")
    return first


class _Reached(Exception):
    """The first block is called: the rest of the network need not run."""


def _enter(model: nn.Module, files: WeightFiles, names: Sequence[str], batches: Sequence[Batch]) -> _Entry:
    """Run the network up to its first block; and once, on two samples, through all of them, to see that each hands its
    output to the next and that what else they get is the same."""
    if not batches:
        raise DataError("the calibration split has no batches")
    with torch.no_grad(), streamed(model, files, names):
        _check_chain(model, names, take(batches[0][0], 2))
        calls = [_first_call(model, names[0], inputs) for inputs, _ in batches]
    flat = [pytree.tree_flatten(call) for call in calls]
    leaves, spec = flat[0]
    stream_at = next((at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if stream_at is None:
        raise ModelError(f"block {names[0]!r} is called without a tensor")
    count = len(leaves[stream_at])
    varying_at = tuple(
        at
        for at, leaf in enumerate(leaves)
        if at != stream_at and isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count > 1
    )
    varied = {stream_at, *varying_at}
    for others, _ in flat:
        _require_same([_without(leaves, varied), _without(others, varied)], names[0], "from batch to batch")
    return _Entry(
        form=_Form(leaves=_without(leaves, varied), places=(stream_at, *varying_at), spec=spec),
        stream=[own[stream_at] for own, _ in flat],
        varying=[tuple(own[at] for at in varying_at) for own, _ in flat],
        targets=[target for _, target in batches],
    )


def _without(leaves: Sequence[Any], places: Collection[int]) -> list[Any]:
    return [None if at in places else leaf for at, leaf in enumerate(leaves)]


def _first_call(model: nn.Module, name: str, inputs: Any) -> tuple[Any, Any]:
    calls: list[tuple[Any, Any]] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Reached

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            forward(model, inputs)
    finally:
        hook.remove()
    if not calls:
        raise ModelError(f"the network never calls its block {name!r}")
    return calls[0]


def _check_chain(model: nn.Module, names: Sequence[str], inputs: Any) -> None:
    calls: dict[str, list[Any]] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[name] = pytree.tree_leaves((args, kwargs))
        outputs[name] = _stream_of(output)

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name), with_kwargs=True) for name in names]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for before, name in pairwise(names):
        if before not in calls or name not in calls:
            raise ModelError(f"the network never calls its block {name if before in calls else before!r}")
        own = [leaf for leaf in calls[name] if isinstance(leaf, Tensor)]
        if not own or not torch.equal(own[0], outputs[before]):
            raise ModelError(f"block {name!r} does not read what block {before!r} gives; name others (blocks=...)")
        _require_same([_rest(calls[names[0]]), _rest(calls[name])], name, "from block to block")


def _rest(leaves: Sequence[Any]) -> list[Any]:
    """All but the first tensor."""
    at = next(at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return _without(leaves, {at})


def _require_same(calls: Sequence[list[Any]], name: str, where: str) -> None:
    for one, other in zip(*calls, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            is_same = one.shape == other.shape and torch.equal(one, other)
        else:
            is_same = type(one) is type(other) and (one is other or one == other)
        if not is_same:
            raise ModelError(
                f"what block {name!r} is called with changes {where}: take samples of one length, and switch caches "
                f"off (use_cache=False)"
            )


# --- one block --------------------------------------------------------------------------------------------------------

Streams: TypeAlias = tuple[list[Tensor], list[Tensor]]  # of the dense and of the pruned network, batch by batch


class _Pruner:
    """Prunes blocks that stand alone, one after the other."""

    def __init__(self, entry: _Entry, recipe: Recipe, kept: float, channel_multiple: int) -> None:
        self.entry, self.recipe, self.kept, self.multiple = entry, recipe, kept, channel_multiple
        self.known: dict[str, Structures] = {}  # by the shapes of a block, on which alone its structures hang

    def prune(self, name: str, block: nn.Module, streams: Streams | None) -> tuple[PrunedBlock, nn.Module, Streams]:
        """streams: what arrives at the block; None at the first, where both are what the network gives."""
        began, recipe = time.perf_counter(), self.recipe
        dense, arriving = map(self.entry.batches, streams or (self.entry.stream, self.entry.stream))
        alone = _Alone(block, self.entry.form)
        structures = self._structures(alone, dense[0][0])
        moments = observe(alone, structures, dense, recipe.observe, seed=recipe.seed)
        scores = score(alone, structures, moments, recipe.score, seed=recipe.seed)
        del moments
        widths = uniform(structures, self.kept, self.multiple).widths
        plan = make_plan(structures, scores, widths, channel_multiple=self.multiple)
        pruned = apply_plan(alone, plan)
        repaired, report = repair(alone, pruned, plan, dense, recipe.repair, arriving=arriving, seed=recipe.seed)
        after = (_run(alone, dense), _run(repaired, arriving))
        row = PrunedBlock(
            block=name,
            cuts=tuple(replace(cut, group=_renamed(cut.group, name)) for cut in plan.cuts),
            edits=tuple(replace(edit, module=_renamed(edit.module, name)) for edit in plan.edits),
            repair=tuple(replace(row, module=_renamed(row.module, name)) for row in report.rows),
            params_before=_num_params(alone),
            params_after=_num_params(repaired),
            error=_error(*after),
            seconds=time.perf_counter() - began,
        )
        return row, repaired.get_submodule(_BLOCK), after

    def _structures(self, alone: nn.Module, inputs: Any) -> Structures:
        kind = digest([(name, list(value.shape)) for name, value in alone.state_dict().items()])
        if kind not in self.known:
            self.known[kind] = list_structures(alone, inputs)
        return replace(self.known[kind], model_fingerprint=model_fingerprint(alone))


def _renamed(name: str, block: str) -> str:
    """The name of a part of a block that stands alone, in the network."""
    return block + name.removeprefix(_BLOCK)


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _run(alone: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [forward(alone, inputs) for inputs, _ in batches]


def _error(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    wrong = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(dense, pruned, strict=True))
    count = sum(a.numel() for a in dense)
    mean = sum(float(a.sum(dtype=torch.float64)) for a in dense) / count
    spread = sum(float((a - mean).square().sum(dtype=torch.float64)) for a in dense)
    return wrong / max(spread, 1e-30)


def _summary(row: PrunedBlock) -> str:
    return f"{row.block}: {row.params_before:,} -> {row.params_after:,} parameters, error behind it {row.error:.2%}"


# --- what a run that was killed goes on from --------------------------------------------------------------------------


class _Work:
    """The pruned blocks, and what a run that was killed goes on from."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder, self.path = folder, folder / _WORK
        if folder.exists() and any(folder.iterdir()) and not self.path.is_dir():
            raise RunFolderError(f"{folder}: holds something already; name an empty or a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        told = to_json(dict(about)).encode()
        if (self.path / _ABOUT).is_file() and (self.path / _ABOUT).read_bytes() != told:
            raise RunFolderError(
                f"{folder}: a run with another network, other samples or settings was begun here; go on with those, or "
                f"remove the folder"
            )
        write_atomically(self.path / _ABOUT, told)

    def finished(self, count: int) -> list[PrunedBlock]:
        """The blocks that were done, up to the first that was not."""
        rows: list[PrunedBlock] = []
        for number in range(count):
            path = self._row(number)
            if not path.is_file():
                break
            rows.append(from_json(PrunedBlock, path.read_bytes(), str(path)))
        return rows

    def streams(self, number: int) -> Streams:
        """What arrives at the block of that number."""
        content = load_file(self._streams(number))
        count = len(content) // 2
        return [content[f"dense.{i}"] for i in range(count)], [content[f"pruned.{i}"] for i in range(count)]

    def finish(self, number: int, row: PrunedBlock, weights: dict[str, Tensor], streams: Streams) -> None:
        """The row is written last: without it, the block was not done."""
        save_file(weights, self._part(number))
        named = {
            f"{kind}.{i}": value.contiguous()
            for kind, own in zip(_KINDS, streams, strict=True)
            for i, value in enumerate(own)
        }
        save_file(named, self._streams(number + 1))
        write_atomically(self._row(number), to_json(row).encode())
        self._streams(number).unlink(missing_ok=True)

    def parts(self, count: int) -> list[Path]:
        return [self._part(number) for number in range(count)]

    def write_rest(self, files: WeightFiles, model: nn.Module, names: Sequence[str]) -> Path:
        """What lies outside of the blocks as it is in the files, where what is shared may be there once."""
        stored = [name for name in model.state_dict() if name in files.names]
        outside = [name for name in stored if not any(name.startswith(f"{block}.") for block in names)]
        path = self.folder / "weights-outside.safetensors"
        save_file(files.read(outside), path)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _part(self, number: int) -> Path:
        return self.folder / f"weights-{number:05d}.safetensors"

    def _streams(self, number: int) -> Path:
        return self.path / f"streams-{number:05d}.safetensors"

    def _row(self, number: int) -> Path:
        return self.path / f"block-{number:05d}.json"
