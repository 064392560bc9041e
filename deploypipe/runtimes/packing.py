"""Between a user's batches (a tensor, a tuple or a dict) and a session's named arrays, both ways.

How the network packs its outputs is kept in the file's output names, so that a file alone is enough to call
`metric(outputs, target)`: a tensor is `output`; a tuple is `output_0`, `output_1`, ...; a dict keeps its keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import DataError, ModelError
from deploypipe.runtimes import Array
from deploypipe.task import tensors

_SINGLE = "output"


def feed(inputs: Any, input_names: Sequence[str]) -> dict[str, Array]:
    """One batch of inputs as named arrays: a dict by its keys, anything else by position."""
    if isinstance(inputs, dict):
        named = {name: inputs[name] for name in input_names if name in inputs}
    else:
        named = dict(zip(input_names, tensors(inputs), strict=False))
    if len(named) < len(input_names):
        absent = ", ".join(name for name in input_names if name not in named)
        raise DataError(f"a batch has no {absent}; the model file takes {', '.join(input_names)}")
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in named.items()}


def name_outputs(outputs: Any) -> dict[str, Tensor]:
    """What the network returned as named tensors; ModelError where it is nested or holds anything else."""
    if isinstance(outputs, Tensor):
        return {_SINGLE: outputs}
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif isinstance(outputs, (tuple, list)):
        named = {f"{_SINGLE}_{i}": tensor for i, tensor in enumerate(outputs)}
    else:
        named = {}
    if not named or not all(isinstance(tensor, Tensor) for tensor in named.values()):
        raise ModelError(
            f"the network returns {type(outputs).__name__}; return a tensor, or a flat tuple or dict of tensors"
        )
    return named


def repack(output_names: Sequence[str], arrays: Sequence[Array]) -> Any:
    """A session's outputs, packed as the network packs them: the inverse of `name_outputs`."""
    outputs = [torch.from_numpy(array) for array in arrays]
    if list(output_names) == [_SINGLE]:
        return outputs[0]
    if list(output_names) == [f"{_SINGLE}_{i}" for i in range(len(outputs))]:
        return tuple(outputs)
    return dict(zip(output_names, outputs, strict=True))
