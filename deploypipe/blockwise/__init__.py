"""Prune a network block by block, if it does not fit into memory twice.

The weights stay in their file. One block at a time is read, observed, scored, cut, repaired and written. It is observed
on the outputs of the dense blocks before it. Repair starts from the outputs of the pruned blocks instead, so it also
corrects earlier errors (as GPTQ does for rounding, arXiv:2210.17323, section 3.3). Between two blocks both streams are
stored on disk. The width of the stream between blocks is kept, and no block is removed as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.blockwise.block_inputs import find_calls, stream_of
from deploypipe.blockwise.prune_block import PrunedBlock, Pruner, summary
from deploypipe.blockwise.work_folder import WorkFolder
from deploypipe.data import as_pair
from deploypipe.errors import ConfigError, ModelError
from deploypipe.files.hashing import digest
from deploypipe.networks.fingerprints import state_fingerprint
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.networks.streamed_weights import WeightFiles, streamed, without_weights
from deploypipe.pruning.surgery.apply_plan import cut_out
from deploypipe.pruning.surgery.saved_network import own_weights, save_parts
from deploypipe.recipe import Recipe
from deploypipe.records import Notify, Progress, PruningPlan, silent
from deploypipe.scoring import needs_derivatives
from deploypipe.split_fingerprints import fingerprint_of
from deploypipe.task import forward

_TOLERANCE = 0.01  # of the norm of the last block's output; half precision with other batch sizes differs by 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseResult:
    """The result of `prune_blockwise`; the network is in its folder."""

    plan: PruningPlan
    blocks: tuple[PrunedBlock, ...]
    params_before: int
    params_after: int


def prune_blockwise(
    build_model: Callable[[], nn.Module],
    weights: Path | str,
    batches: Sequence[Any],
    folder: Path | str,
    recipe: Recipe,
    *,
    kept: float,
    channel_multiple: int = 1,
    blocks: Sequence[str] = (),
    notify: Notify = silent,
) -> BlockwiseResult:
    """Keep the share `kept` of every group of units and heads inside the blocks, and save the pruned network.

    build_model: its parameters take no memory, and values it loads into them are dropped. weights: a
    `.safetensors` file, or the index of several. batches: calibration samples, all of one length, in any form that
    `deploypipe.data` reads. recipe: only its
    score, observe, repair and seed are used. blocks: names of modules, each of which reads the output of the one
    before; by default the longest list of modules of one class. `load_pruned(folder, build_model)` loads the result.

    Memory: a few times one block, its second moments, both streams, and one layer's activations for all samples of
    `recipe.repair`. The same call resumes an interrupted one. Raises ConfigError for a share or a score that cannot be
    used; ModelError if the blocks do not feed one another, the samples have several lengths or the file lacks weights;
    DataError without samples; RunFolderError if the folder holds something else.
    """
    _check_settings(recipe, kept)
    folder, files, batches = Path(folder), WeightFiles(Path(weights)), [as_pair(batch) for batch in batches]
    with without_weights():
        model = unwrapped(build_model()).eval()
    names = tuple(blocks) or find_blocks_in_a_row(model)
    for name in set(names) - dict(model.named_modules()).keys():
        raise ModelError(f"the network has no module {name!r} (blocks=...); see named_modules()")
    fingerprint = state_fingerprint(files.tensors_of(model))
    settings = [names, kept, channel_multiple, recipe.score, recipe.observe, recipe.repair, recipe.seed]
    work = WorkFolder(folder, {"model": fingerprint, "data": fingerprint_of(batches), "settings": digest(settings)})
    with streamed(model, files, names):
        calls = find_calls(model, names, batches)
    pruner = Pruner(calls, recipe, kept, channel_multiple)
    done = work.finished(len(names))
    for number, name in enumerate(names):
        if number == len(done):
            done.append(_prune(number, name, model, files, pruner, work))
        notify(Progress(stage="blocks", done=number + 1, total=len(names), message=summary(done[number])))
    plan = PruningPlan(
        model_fingerprint=fingerprint,
        cuts=tuple(cut for row in done for cut in row.cuts),
        edits=tuple(edit for row in done for edit in row.edits),
        blocks=(),
    )
    if not plan.edits:
        raise ModelError(
            f"nothing inside {names[0]!r} and the blocks after it can be removed; name other blocks (blocks=...)"
        )
    parts = [*work.parts(len(names)), work.write_rest(files, model, names)]
    _require_same(cut_out(model, plan), parts, names, batches[0][0], work.streams(len(names))[1][0])
    save_parts(folder, plan, parts)
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
        raise ModelError("the network has no list of blocks of one class; name them in order (blocks=...)")
    return longest


def _prune(
    number: int, name: str, model: nn.Module, files: WeightFiles, pruner: Pruner, work: WorkFolder
) -> PrunedBlock:
    """Read, prune and write one block. Nothing of it stays in memory."""
    block = copied(model.get_submodule(name))
    files.load_(block, f"{name}.")
    row, pruned, streams = pruner.prune(name, block, work.streams(number) if number else None)
    work.finish(number, row, {f"{name}.{key}": value for key, value in own_weights(pruned).items()}, streams)
    return row


def _require_same(
    pruned: nn.Module, parts: Sequence[Path], names: Sequence[str], inputs: Any, expected: Tensor
) -> None:
    """Raise ModelError unless the blocks together give the same output for a batch as one by one."""
    given: list[Tensor] = []
    hook = pruned.get_submodule(names[-1]).register_forward_hook(lambda *call: given.append(stream_of(call[2])))
    with torch.no_grad(), streamed(pruned, WeightFiles(*parts), names):
        forward(pruned, inputs)
    hook.remove()
    off = float((given[0] - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
    if not off < _TOLERANCE:
        raise ModelError(
            f"the pruned blocks together give other outputs than one by one ({off:.1%} off): they depend on more than "
            f"the output of the block before; prune this network as a whole"
        )


def _check_settings(recipe: Recipe, kept: float) -> None:
    if not 0 < kept < 1:
        remedy = "write the share of units to keep, such as 0.75"
        raise ConfigError("prune_blockwise", "kept", f"must be > 0 and < 1, got {kept!r}", remedy)
    if needs_derivatives(recipe.score):
        remedy = "choose one that needs no loss, such as output_error, mipp or magnitude"
        raise ConfigError("the recipe", "score.kind", f"{recipe.score.kind!r} needs the whole network at once", remedy)
