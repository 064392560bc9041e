"""Hashes of batches, outputs and other trees: equal contents give equal hashes, in every process."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.networks.batch_trees import leaves

_PLAIN = (bool, int, float, complex, str, bytes)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes; of one that is contiguous and in host memory without a copy."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def kind_name(value: Any) -> str:
    """The name of a value's class. The text of an unknown object may hold its address, which differs between runs."""
    return type(value).__qualname__


def hash_tree_(digest: Any, tree: Any, describe: Callable[[Any], str] = kind_name) -> None:
    """Feed a tree to a hash: the places, shapes, types and values of its leaves.

    describe: what of a leaf is fed that is neither a tensor, an array, a plain value nor None.
    """
    for leaf in leaves(tree, ""):
        digest.update(f"{leaf.place} ".encode())
        if isinstance(value := leaf.value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(tensor_bytes(value))
        elif isinstance(value, np.ndarray | np.generic):
            digest.update(f"{value.dtype} {value.shape}\n".encode() + value.tobytes())
        else:
            text = repr(value) if value is None or isinstance(value, _PLAIN) else describe(value)
            digest.update(f"{text}\n".encode())


def digest_of(*trees: Any, describe: Callable[[Any], str] = kind_name) -> str:
    """One hash of several trees; see `hash_tree_`."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tree_(digest, trees, describe)
    return digest.hexdigest()
