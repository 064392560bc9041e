"""The runtime of PyTorch itself, for `torch.export` programs (.pt2): the baseline for deployed files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploypipe.errors import DataError, RuntimeUnavailableError
from deploypipe.runtimes.bound_runs import BoundRun, PlainRun
from deploypipe.runtimes.load_torch_program import load_program

_REMEDY = "measure the ONNX file instead, or, if you trust whoever made it, allow it with `bench --trust-program`"


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerSession:
    """A loaded program; see `deploypipe.runtimes.Session`."""

    path: Path
    module: Any  # GraphModule
    in_spec: Any  # of (args, kwargs)
    device: str
    expected: Mapping[str, tuple[Any, tuple[int | None, ...]]]  # input -> (torch dtype, shape; None: any size)
    constants: Mapping[str, Any]  # all arguments of forward(), in order; a number or a flag with its exported value
    output_names: tuple[str, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.expected)

    def run(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        import torch
        from torch.utils import _pytree as pytree

        values = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        if not self._fit(values):
            raise DataError(self._misfit(inputs, "names, types or shapes differ"))
        flat = [values[n].to(self.device) if n in values else value for n, value in self.constants.items()]
        args, kwargs = pytree.tree_unflatten(flat, self.in_spec)
        try:
            with torch.no_grad():
                outputs = self.module(*args, **kwargs)
        except (RuntimeError, AssertionError, ValueError) as error:  # torch rejects a shape in one of these ways
            raise DataError(self._misfit(inputs, str(error).partition("\n")[0])) from error
        leaves, _ = pytree.tree_flatten(outputs)
        # Copied, since an output may be an input, or a part of one.
        return [np.array(leaf.detach().cpu().numpy()) for leaf in leaves]

    def bind(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> BoundRun:
        """See `deploypipe.runtimes.Session`. A run includes PyTorch's own copies, on a GPU too."""
        return PlainRun(self.run, inputs)

    def _fit(self, values: Mapping[str, Any]) -> bool:
        return values.keys() == self.expected.keys() and all(
            values[name].dtype == dtype
            and values[name].dim() == len(shape)
            and all(wanted in (None, size) for size, wanted in zip(values[name].shape, shape, strict=True))
            for name, (dtype, shape) in self.expected.items()
        )

    def _misfit(self, inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]], reason: str) -> str:
        seen = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
        takes = ", ".join(
            f"{name} {str(dtype).removeprefix('torch.')}{['any' if size is None else size for size in shape]}"
            for name, (dtype, shape) in self.expected.items()
        )
        return f"{self.path}: cannot run on {seen or 'no inputs'} ({reason}); it takes {takes}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerRuntime:
    """Runs programs on `device`, "cpu" or "cuda". A CUDA session returns when the GPU has finished.

    is_trusted: whether files may be opened at all, since a program can run any code when it is loaded.
    """

    device: str = "cpu"
    is_trusted: bool = False

    @contextmanager
    def open(self, path: Path, *, num_threads: int) -> Iterator[EagerSession]:
        """See `deploypipe.runtimes.Runtime`. The number of threads is set for the process, and restored at the end."""
        import torch
        from torch.export.graph_signature import InputKind
        from torch.export.passes import move_to_device_pass
        from torch.utils import _pytree as pytree

        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                "torch detects no CUDA device; install a CUDA build of torch on a machine with a GPU"
            )
        loaded = load_program(path, is_trusted=self.is_trusted, remedy=_REMEDY)
        program = move_to_device_pass(loaded, self.device)
        signature = program.module_call_graph[0].signature
        threads = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            yield EagerSession(
                path=path,
                module=program.module(),
                in_spec=signature.in_spec,
                device=self.device,
                expected={
                    node.name: (
                        node.meta["val"].dtype,
                        tuple(s if isinstance(s, int) else None for s in node.meta["val"].shape),
                    )
                    for node in program.graph.nodes
                    if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
                },
                constants={
                    spec.arg.name: getattr(spec.arg, "value", None)
                    for spec in program.graph_signature.input_specs
                    if spec.kind is InputKind.USER_INPUT
                },
                output_names=_output_names(pytree, signature.out_spec),
            )
        finally:
            torch.set_num_threads(threads)


def _output_names(pytree: Any, spec: Any) -> tuple[str, ...]:
    """The outputs' names, as in `runtimes.named_arrays`."""
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if isinstance(leaves, dict):
        return tuple(str(name) for name in leaves)
    if isinstance(leaves, (tuple, list)):
        return tuple(f"output_{i}" for i in range(spec.num_leaves))
    return ("output",)
