"""Recurrent layers: which weight axis each of their sizes counts, and how to run them without fused kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

RECURRENT = (RNNBase, RNNCellBase)


def sizes_of(module: nn.Module) -> dict[str, Sequence[Tensor]]:
    """Attribute -> the weights whose second axis it counts, in every layer and direction."""
    weights = dict(module.named_parameters(recurse=False))
    if isinstance(module, RNNCellBase):
        return {"input_size": [weights["weight_ih"]], "hidden_size": [weights["weight_hh"]]}
    states = [tensor for name, tensor in weights.items() if name.startswith("weight_hh")]
    projections = [tensor for name, tensor in weights.items() if name.startswith("weight_hr")]
    sizes = {"hidden_size": projections, "proj_size": states} if projections else {"hidden_size": states}
    return {"input_size": [weights["weight_ih_l0"]], **sizes}


def is_input_side(side: str) -> bool:
    """Whether a side of a recurrent layer, such as "weight_ih_l0.1", counts what the layer reads."""
    return side.startswith(("weight_ih_l0", "weight_ih.")) and side.endswith(".1")


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Switch oneDNN off, which computes all steps and gates of an LSTM in one operator."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)
