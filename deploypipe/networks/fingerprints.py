"""Hashes that say whether two networks have the same structure, and the same weights."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.networks.tree_hashes import tensor_bytes


def model_fingerprint(model: nn.Module) -> str:
    """ "<structure>-<weights>": two hashes over the state dict, of names, shapes and dtypes, and of the values."""
    model = unwrapped(model)
    return state_fingerprint(model.state_dict().items())


def structure_fingerprint(model: nn.Module) -> str:
    """The first part of `model_fingerprint`."""
    structure = hashlib.sha256()
    for name, value in model.state_dict().items():
        structure.update(_described(name, value))
    return structure.hexdigest()[:32]


def _described(name: str, value: Any) -> bytes:
    return f"{name}:{tuple(value.shape)}:{value.dtype};".encode() if isinstance(value, Tensor) else b""


def state_fingerprint(state: Iterable[tuple[str, Any]]) -> str:
    """`model_fingerprint` of the network with these names and tensors."""
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, value in state:
        if isinstance(value, Tensor):
            structure.update(_described(name, value))
            weights.update(tensor_bytes(value))
    return f"{structure.hexdigest()[:32]}-{weights.hexdigest()[:32]}"
