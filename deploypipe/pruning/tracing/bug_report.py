"""Write a bug report: the smallest part of a network in which a structure is frozen for the same reason.

The report contains shapes, dtypes and the graph of operations. Weights and inputs are replaced by random ones.
"""

import inspect
import platform
import re
import textwrap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, fx, nn

from deploypipe.errors import ModelError
from deploypipe.files.atomic import write_atomically
from deploypipe.installed_packages import package_versions
from deploypipe.networks.batch_trees import map_tensors
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.modules.module_calls import evaluating, two_samples
from deploypipe.pruning.surgery.saved_network import program_bytes
from deploypipe.pruning.tracing.structures import find_structures
from deploypipe.records import Frozen
from deploypipe.runtimes.load_torch_program import load_program
from deploypipe.task import forward

PROGRAM, INPUTS, README = "module.pt2", "inputs.safetensors", "README.md"
_SAFE_WAY = (
    "pass an instance of the class that its README names, or, if you trust the sender, allow it with trust_program=True"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """The result of `write_reproduction`."""

    module: str  # the submodule of the network; "" is the whole network
    reason: str  # the reason that the part alone gives
    needs_class: bool  # whether the exported program does not reproduce it
    folder: Path


def write_reproduction(model: nn.Module, inputs: Any, name: str, folder: Path) -> Reproduction:
    """Write module.pt2, inputs.safetensors and README.md for a structure that `list_structures` freezes.

    inputs: one batch, as the model gets it. name: of the frozen row. `model` is left unchanged. No weight and no input
    value is written. Whole numbers in buffers (positions and the like) are, and the README quotes class names,
    file names and the line that calls the operation. Raises ModelError if `name` is not frozen, or if no part of the
    network gives the reason with other weights and inputs.
    """
    model = unwrapped(model)
    row = _frozen(model, inputs, name)
    for part, values in _parts(model, two_samples(model, inputs), row.name.partition(":")[0]):
        module = _with_random_weights(model.get_submodule(part))
        local = row.name[len(part) :].lstrip(".")
        if not local and row.kind == "weights":
            local = type(module).__name__
        try:
            rows = find_structures(module, values).frozen
        except Exception:  # it cannot run alone on such values: a larger part may
            continue
        found = next((each for each in rows if _is_same(each, replace(row, name=local))), None)
        if found:
            return _write(module, values, found, part, folder)
    raise ModelError(f"no part of the network freezes {name!r} with other weights and inputs; report {row.reason!r}")


def reproduce(folder: Path, module: nn.Module | None = None, *, trust_program: bool = False) -> str:
    """List the structures that `list_structures` freezes in a reproduction, one per line.

    module: an instance of the class that the README names, if it names one. Its weights are replaced. Without it
    module.pt2 is loaded, which can run any code: raises ModelError unless `trust_program`.
    """
    return "\n".join(map(_line, _reproduced(folder, module, trust_program=trust_program)))


def _reproduced(folder: Path, module: nn.Module | None = None, *, trust_program: bool) -> tuple[Frozen, ...]:
    try:
        values = _unpacked(load_file(folder / INPUTS))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder / INPUTS}: cannot be read as safetensors ({error}); ask the sender for the file again"
        ) from None
    if module is not None:
        return find_structures(_with_random_weights(module), values).frozen
    program = load_program(folder / PROGRAM, is_trusted=trust_program, remedy=_SAFE_WAY)
    return find_structures(_with_layers(program.module()), values).frozen


# --- finding the part -------------------------------------------------------------------------------------------------


def _frozen(model: nn.Module, inputs: Any, name: str) -> Frozen:
    rows = find_structures(model, inputs).frozen
    for row in rows:
        if row.name == name:
            return row
    listed = ", ".join(row.name for row in rows) or "none"
    raise ModelError(f"{name!r} is not frozen in this network; frozen structures: {listed}")


def _line(row: Frozen) -> str:
    return f"{row.kind} {row.name!r}: {row.reason}"


def _is_same(a: Frozen, b: Frozen) -> bool:
    return (a.kind, a.name, _without_details(a.reason)) == (b.kind, b.name, _without_details(b.reason))


def _without_details(reason: str) -> str:
    """The reason without names of modules and numbers, which differ in a part of the network."""
    return re.sub(r"[\d.e+-]*\d", "#", re.sub(r"'[^']*'", "''", re.sub(r" \(in '[^']*'\)", "", reason)))


def _parts(model: nn.Module, inputs: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The module and all modules around it, smallest first, each with random inputs like its own."""
    steps = name.split(".")
    names = [".".join(steps[:count]) for count in range(len(steps), -1, -1)]
    given: dict[str, Any] = {"": inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(name, _tensors_given(module, args, kwargs))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, k, name=name: keep(name, m, a, k), with_kwargs=True
        )
        for name in names[:-1]
    ]
    try:
        with evaluating(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        values = given.get(name)
        if values:
            yield name, _random_inputs(values)


def _tensors_given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors by parameter name; None if the module also gets arguments that cannot be saved."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    others = [name for name in bound if name not in tensors]
    is_usual = all(bound[name] is signature.parameters[name].default for name in others)
    return tensors if tensors and is_usual else None


def _random_inputs(values: Any) -> Any:
    """Random inputs of the same shapes and dtypes, and for whole numbers the same range."""
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype is torch.bool or not tensor.numel():
            return torch.ones_like(tensor)
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)

    return map_tensors(draw, values)


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy with random, trainable weights; buffers of whole numbers stay."""
    copy = deepcopy(module).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        for buffer in _other_tensors(copy):
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))  # positive, because some are divisors
    return copy


def _other_tensors(module: nn.Module) -> list[Tensor]:
    attributes = [value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor)]
    return [*module.buffers(), *attributes]


# --- the folder -------------------------------------------------------------------------------------------------------


def _write(module: nn.Module, values: Any, row: Frozen, part: str, folder: Path) -> Reproduction:
    folder.mkdir(parents=True, exist_ok=True)
    named = values if isinstance(values, dict) else {str(i): tensor for i, tensor in enumerate(values)}
    write_atomically(folder / INPUTS, save({name: t.contiguous().clone() for name, t in named.items()}))
    (folder / PROGRAM).unlink(missing_ok=True)
    where = ""
    try:
        keywords = values if isinstance(values, dict) else {}
        program = torch.export.export(module, () if keywords else values, keywords)
        where = _where(program, row.reason)
        write_atomically(folder / PROGRAM, program_bytes(program))
        needs_class = not any(_is_same(each, row) for each in _reproduced(folder, trust_program=True))
        program_note = (
            "does not reproduce this reason: its sizes are constants, and its classes are lost"
            if needs_class
            else "reproduces this reason without any class"
        )
    except Exception as error:  # torch.export, and list_structures on what it gives, raise many classes
        needs_class, program_note = True, f"cannot be made or read ({type(error).__name__}: {error})"
    found = Reproduction(module=part, reason=_line(row), needs_class=needs_class, folder=folder)
    write_atomically(folder / README, _readme(module, values, found, program_note, where).encode())
    return found


def _where(program: torch.export.ExportedProgram, reason: str) -> str:
    """The stack trace of the operation that the reason names, as recorded by torch.export."""
    operation = re.search(r"(\w+)\(\)", reason)
    for node in program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if operation and packet is not None and packet.__name__.strip("_") == operation[1].strip("_"):
            return str(node.meta.get("stack_trace", ""))
    return ""


def _readme(module: nn.Module, values: Any, found: Reproduction, program_note: str, where: str) -> str:
    cls = type(module)
    named = values if isinstance(values, dict) else {str(i): tensor for i, tensor in enumerate(values)}
    versions = {**package_versions("deploypipe", "torch"), "python": platform.python_version()}
    try:
        place = f"{inspect.getsourcefile(cls.forward)}:{inspect.getsourcelines(cls.forward)[1]}"
    except (OSError, TypeError):
        place = "source not found"
    making = f"module = ...  # a {cls.__module__}.{cls.__qualname__} as printed below; its weights do not matter\n"
    argument = ", module" if found.needs_class else ", trust_program=True"
    warning = "" if found.needs_class else f" Loading `{PROGRAM}` can run any code: do so only if you trust the sender."
    parts = [
        f"# {found.reason}",
        f"Frozen by `deploypipe.pruning.tracing.structures.list_structures` in "
        f"{f'the submodule `{found.module}`' if found.module else 'the whole network'}, run alone. Weights and inputs "
        "are random; only whole numbers in buffers are the network's own.",
        ", ".join(f"{name} {text}" for name, text in versions.items()),
        "## How to reproduce it\n\nIn this folder:",
        "```python\nfrom pathlib import Path\n\nfrom deploypipe.pruning.tracing.bug_report import reproduce\n\n"
        f"{making if found.needs_class else ''}print(reproduce(Path('.'){argument}))\n```",
        f"`{PROGRAM}` {program_note}.{warning}",
        f"## The module\n\nClass `{cls.__module__}.{cls.__qualname__}`, `forward()` at {place}",
        f"```\n{module!r}\n```",
        "\n".join(f"- input `{name}`: {tuple(t.shape)} {t.dtype}" for name, t in named.items()),
    ]
    if where:
        parts.append(f"## Where it is called\n\n```\n{textwrap.dedent(where)}\n```")
    return "\n\n".join(parts) + "\n"


# --- reading it -------------------------------------------------------------------------------------------------------


def _unpacked(tensors: dict[str, Tensor]) -> Any:
    if all(name.isdigit() for name in tensors):
        return tuple(tensors[name] for name in sorted(tensors, key=int))
    return tensors


def _with_layers(program: nn.Module) -> fx.GraphModule:
    """The exported program with linear layers, convolutions and the like as modules under their old names."""
    assert isinstance(program, fx.GraphModule)
    graph = program.graph
    root: dict[str, Any] = {}
    for node in list(graph.nodes):
        layer = _LAYERS.get(str(node.target)) if node.op == "call_function" else None
        places = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "get_attr"]
        name = str(places[0].target).rpartition(".")[0] if places else ""
        if layer is None or not name:
            continue
        values = [_attribute(program, a.target) if a in places else a for a in node.args]
        root[name] = layer(*values)
        (read,) = [a for a in node.args if isinstance(a, fx.Node) and a not in places]
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (read,)))
        graph.erase_node(node)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in root:
            root[str(node.target)] = _attribute(program, node.target)
    return fx.GraphModule(root, graph)


def _attribute(module: nn.Module, path: Any) -> Any:
    value: Any = module
    for step in str(path).split("."):
        value = getattr(value, step)
    return value


def _linear(_x: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias)


def _convolution(kind: Any) -> Any:
    def make(
        _x: Any,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> nn.Module:
        sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        layer = kind(*sizes, stride, padding, dilation=dilation, groups=groups, bias=bias is not None)
        return _filled(layer, weight, bias)

    return make


def _layer_norm(
    _x: Any, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, _: bool = True
) -> nn.Module:
    return _filled(nn.LayerNorm(tuple(shape), eps, bias=bias is not None), weight, bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.register_parameter("weight", nn.Parameter(weight.detach()))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.detach()))
    return layer


_LAYERS: dict[str, Any] = {
    "aten.linear.default": _linear,
    "aten.conv1d.default": _convolution(nn.Conv1d),
    "aten.conv2d.default": _convolution(nn.Conv2d),
    "aten.conv3d.default": _convolution(nn.Conv3d),
    "aten.layer_norm.default": _layer_norm,
}
