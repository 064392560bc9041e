"""Save and load a pruned network: the plan, the weights, and an exported program that needs no Python class."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deploypipe.errors import ConfigError, ModelError, PlanError
from deploypipe.export.onnx_export.forget_batch_sizes import forget_sizes_
from deploypipe.files.atomic import write_atomically
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import to_json
from deploypipe.networks.batch_trees import as_plain, map_leaves, map_tensors
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.networks.streamed_weights import INDEX_SUFFIX, WeightFiles, without_weights
from deploypipe.plan_file import PLAN, read_plan
from deploypipe.pruning.modules.hook_computed_weights import with_plain_weights
from deploypipe.pruning.modules.module_calls import two_samples
from deploypipe.pruning.surgery.apply_plan import check_fingerprint, cut_out
from deploypipe.pruning.surgery.plan_on_module import plan_of, require_fit
from deploypipe.records import PruningPlan
from deploypipe.runtimes.load_torch_program import load_program
from deploypipe.task import as_arguments, has_batch_axis, num_samples, repeat_samples, take
from deploypipe.task_result_checks import kind_of
from deploypipe.text import strict_json

WEIGHTS, PROGRAM, HASHES = "weights.safetensors", "model.pt2", "hashes.json"
INDEX = f"weights{INDEX_SUFFIX}"
_BY_NAME = 'write save_pruned(small, inputs=example_inputs, folder="small")'
_SAFE_WAY = (
    "load plan and weights instead with load_pruned(folder, build_model), or, if you trust whoever made the folder, "
    "allow it with trust_program=True"
)


def save_pruned(
    model: nn.Module, plan: PruningPlan | None = None, inputs: Any = None, folder: Path | str | None = None
) -> None:
    """Write plan.json, weights.safetensors, model.pt2 (any batch size, evaluation mode) and the hashes of all three.

        save_pruned(small, inputs=example_inputs, folder="small")

    plan: what the network was cut by; None: the one that `prune` left on it. inputs: one batch; only its shapes and
    dtypes are used, and no sample is written to a file. hashes.json is written last, so a folder without it is
    unfinished. Raises PlanError if the plan is absent or does not fit, ModelError if the network cannot be exported.
    """
    if not isinstance(plan, PruningPlan | None):
        raise ConfigError("save_pruned", "plan", f"must be a PruningPlan, got {kind_of(plan)}", _BY_NAME)
    if inputs is None or folder is None:
        raise ConfigError("save_pruned", "inputs" if inputs is None else "folder", "is absent", _BY_NAME)
    model, folder = unwrapped(model), Path(folder)
    plan = plan_of(model) if plan is None else plan
    require_fit(model, plan)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HASHES).unlink(missing_ok=True)
    write_atomically(folder / PLAN, to_json(plan).encode())
    write_atomically(folder / WEIGHTS, save(own_weights(model)))
    write_atomically(folder / PROGRAM, _program(model, inputs))
    _write_hashes(folder, (PLAN, WEIGHTS, PROGRAM))


def save_parts(folder: Path, plan: PruningPlan, parts: Sequence[Path]) -> None:
    """Finish a folder that already holds the weights in several files: write plan, hashes and an index as
    `transformers` does. No program is written, because its export needs the whole network in memory."""
    names = {name: part.name for part in parts for name in WeightFiles(part).names}
    index = {"metadata": {"total_size": sum(part.stat().st_size for part in parts)}, "weight_map": names}
    write_atomically(folder / PLAN, to_json(plan).encode())
    write_atomically(folder / INDEX, strict_json.dumps(index, indent=2).encode())
    _write_hashes(folder, [PLAN, INDEX, *(part.name for part in parts)])


def _write_hashes(folder: Path, names: Sequence[str]) -> None:
    hashes = {name: file_sha256(folder / name) for name in names}
    write_atomically(folder / HASHES, strict_json.dumps(hashes, indent=2).encode())


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in the form safetensors needs: on the CPU, contiguous in any memory format, nothing shared."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def load_saved(
    folder: Path | str, build_model: Callable[[], nn.Module] | None = None, *, trust_program: bool = False
) -> nn.Module:
    """The network in a folder that `save_pruned` or `prune_blockwise` wrote, in evaluation mode, to train further.

    build_model: makes the dense network with the structure that the plan was made for; its weights are replaced. Only
    JSON and safetensors are read then.
    trust_program: without `build_model`, the exported program is loaded, which can only be run. Loading a program can
    run any code, and hashes.json next to it proves nothing about its origin: ModelError unless this is set.

    Files that differ from hashes.json are refused before use. A network saved in parts has no program; its weights stay
    in their files until they are read.
    """
    folder = Path(folder)
    is_in_parts = _check_hashes(folder)
    if build_model is None:
        if is_in_parts:
            raise ModelError(f"{folder}: saved block by block, so without a program; load it with build_model")
        program: nn.Module = load_program(folder / PROGRAM, is_trusted=trust_program, remedy=_SAFE_WAY).module()
        return program
    plan = read_plan(folder / PLAN)
    if not is_in_parts:
        return load_cut(build_model, plan, folder / WEIGHTS)
    with without_weights():
        model = _cut_like(build_model, plan)
    WeightFiles(folder / INDEX).load_(model)
    return model.eval()


def load_cut(build_model: Callable[[], nn.Module], plan: PruningPlan, weights: Path) -> nn.Module:
    """The network that `plan` leaves, with the weights in a .safetensors file, in evaluation mode."""
    model = _cut_like(build_model, plan)
    try:
        model.load_state_dict(load_file(weights), strict=True)
    except SafetensorError as error:
        raise ModelError(f"{weights} is not a safetensors file ({error}); save the network again") from None
    except RuntimeError as error:
        raise PlanError(f"{weights} does not fit the network cut by the plan: {error}; save it again") from error
    return model.eval()


def load_dense(build_model: Callable[[], nn.Module], fingerprint: str) -> nn.Module:
    """The dense network, in evaluation mode. Raises PlanError unless it is the one with this fingerprint."""
    model = unwrapped(build_model())
    nothing = PruningPlan(model_fingerprint=fingerprint, cuts=(), edits=(), blocks=())
    check_fingerprint(with_plain_weights(model), nothing)
    return model.eval()


def _cut_like(build_model: Callable[[], nn.Module], plan: PruningPlan) -> nn.Module:
    dense = with_plain_weights(unwrapped(build_model()))
    check_fingerprint(dense, plan, structure_only=True)
    return cut_out(dense, plan)


def _program(model: nn.Module, inputs: Any) -> bytes:
    """The exported program, without example values and without the source paths that torch records."""
    batch = torch.export.Dim("batch", min=1)
    zeros = map_tensors(torch.zeros_like, two_samples(model, inputs))
    args, kwargs = as_arguments(zeros)
    size = num_samples(zeros)
    axes = map_leaves(lambda leaf: {0: batch} if has_batch_axis(leaf, size) else None, kwargs or args)
    network = copied(model).eval()
    network.forward = _with_plain_outputs(network.forward)
    forget_sizes_(network, [repeat_samples(network, take(zeros, 1), count) for count in (2, 3)])
    try:
        program = torch.export.export(
            network,
            args=args,
            kwargs=kwargs,
            dynamic_shapes=axes,
        )
    except Exception as error:  # torch.export raises many classes on code it cannot follow
        raise_if_exhausted(error)
        raise ModelError(
            f"torch.export cannot export the network with a free batch size ({type(error).__name__}: {error}); "
            "remove data-dependent branches and fixed batch sizes from forward()"
        ) from error
    return program_bytes(program)


def _with_plain_outputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward() that returns dicts and tuples instead of dataclasses and NamedTuples, whose classes a program needs."""

    @wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return as_plain(forward(*args, **kwargs))

    return plain


def program_bytes(program: torch.export.ExportedProgram) -> bytes:
    """The bytes that torch.export.save() writes, without source paths and example values (which it would pickle)."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    buffer = BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _check_hashes(folder: Path) -> bool:
    """Whether the weights are in several parts."""
    try:
        expected = dict(json.loads((folder / HASHES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder} is not a finished pruned network ({HASHES}: {error}); save it again") from error
    is_in_parts = INDEX in expected
    for name in expected if is_in_parts else (PLAN, WEIGHTS, PROGRAM):
        path = folder / Path(name).name
        if not path.is_file():
            raise ModelError(f"{path} is missing; save the network again")
        if file_sha256(path) != expected.get(name):
            raise ModelError(
                f"{path} was changed after it was saved (its sha256 is not the one in {HASHES}); save again"
            )
    return is_in_parts
