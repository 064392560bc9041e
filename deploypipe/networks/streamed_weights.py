"""Read weights from their file only when needed, for networks that do not fit into memory twice."""

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deploypipe.errors import ModelError

INDEX_SUFFIX = ".safetensors.index.json"


class WeightFiles:
    """The tensors of `.safetensors` files, or of those that an index (`*.safetensors.index.json`) names, by name."""

    def __init__(self, *paths: Path) -> None:
        """Raises ModelError if a file is missing or not of the kind that its name says."""
        self.path = paths[0] if len(paths) == 1 else paths[0].parent
        self._files: dict[str, Path] = {}
        for path in paths:
            self._files |= _read_index(path) if path.name.endswith(INDEX_SUFFIX) else _read_names(path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Views of the files: memory is used when a tensor is read, and freed with the last view.

        Raises ModelError with the name of the first missing tensor.
        """
        found: dict[str, Tensor] = {}
        wanted = list(names)
        for name in wanted:
            if name not in self._files:
                raise ModelError(f"{self.path}: holds no tensor {name!r}, which the network has; see that both match")
        for file in dict.fromkeys(self._files[name] for name in wanted):
            with _opened(file) as content:
                found |= {name: _tensor(content, name) for name in wanted if self._files[name] == file}
        return {name: found[name] for name in wanted}

    def load_(self, module: nn.Module, prefix: str = "", names: Collection[str] | None = None) -> None:
        """Give `module`, whose names begin with `prefix` in the files, its weights, or those of `names`: views, as in
        `read`. A parameter that a module has under several names need be there under one of them.
        """
        state = self.read_of(module, module.state_dict() if names is None else names, prefix)
        tied = _tied(module)
        try:
            module.load_state_dict(state, assign=True, strict=names is None)
        except RuntimeError as error:
            raise ModelError(f"{self.path}: does not fit the network: {error}") from error
        for name, *others in tied:
            for other in others:
                _set_(module, other, module.get_parameter(name))

    def read_of(self, module: nn.Module, names: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
        """The tensors for the state dict of `module`, by their names in it."""
        known = {name: self._known_as(module, name, prefix) for name in names}
        found = self.read(dict.fromkeys(known.values()))
        return {name: found[stored] for name, stored in known.items()}

    def tensors_of(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name and value of everything in the state dict of `module`, one at a time, as in `load_`."""
        for name in module.state_dict():
            yield from self.read_of(module, [name]).items()

    def _known_as(self, module: nn.Module, name: str, prefix: str) -> str:
        if prefix + name in self._files:
            return prefix + name
        parameters = dict(module.named_parameters(remove_duplicate=False))
        own = parameters.get(name)
        same = [other for other, value in parameters.items() if value is own and prefix + other in self._files]
        return prefix + (same[0] if same else name)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made meanwhile have parameters with a shape and no memory ("meta"). Buffers are made as always: what a
    constructor computes, such as the angles of rotary positions, is not in any file."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is shared stays one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with warnings.catch_warnings():  # of each weight that a constructor loads, and that goes nowhere
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model, which is a no-op")
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def streamed(model: nn.Module, files: WeightFiles, blocks: Sequence[str]) -> Iterator[None]:
    """Inside, a network made `without_weights` can be called: each block has its weights only while it runs."""
    state, hooks = model.state_dict(), []
    outside = [name for name in state if not any(name.startswith(f"{block}.") for block in blocks)]
    try:
        for name, block in zip(blocks, map(model.get_submodule, blocks), strict=True):
            hooks.append(block.register_forward_pre_hook(partial(_load_before, files, f"{name}."), prepend=True))
            hooks.append(block.register_forward_hook(_drop_after, always_call=True))
        files.load_(model, names=outside)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _drop_weights_(model)


def _load_before(files: WeightFiles, prefix: str, block: nn.Module, _: Any) -> None:
    files.load_(block, prefix)


def _drop_after(block: nn.Module, *_: Any) -> None:
    _drop_weights_(block)


def _drop_weights_(module: nn.Module) -> None:
    """Free the memory of all parameters; their shapes stay."""
    tied = _tied(module)
    for name, parameter in list(module.named_parameters()):
        _set_(module, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    for name, *others in tied:
        for other in others:
            _set_(module, other, module.get_parameter(name))


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def _set_(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    module.get_submodule(owner).register_parameter(own, parameter)


def _read_index(path: Path) -> dict[str, Path]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): path.parent / file for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is not an index of weights ({type(error).__name__}: {error})") from error
    for file in set(files.values()):
        if file.parent.resolve() != path.parent.resolve():
            raise ModelError(f"{path}: names {file}, which is not next to it; use files in one folder")
    return files


def _read_names(path: Path) -> dict[str, Path]:
    with _opened(path) as content:
        names: list[str] = content.keys()  # type: ignore[no-untyped-call]
        return dict.fromkeys(names, path)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); it is absent or was not written") from error


def _tensor(content: safe_open, name: str) -> Tensor:
    value: Tensor = content.get_tensor(name)  # type: ignore[no-untyped-call]
    return value
