"""Recurrent layers, and sizes that modules keep as plain numbers: what each counts, and where the code got one from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from deploypipe.pruning.indices import Origin

RECURRENT = (RNNBase, RNNCellBase)


def sizes_of(module: nn.Module) -> dict[str, Sequence[Tensor]]:
    """By attribute: the weights of a recurrent layer whose second axis it counts, in every layer and direction."""
    weights = dict(module.named_parameters(recurse=False))
    if isinstance(module, RNNCellBase):
        return {"input_size": [weights["weight_ih"]], "hidden_size": [weights["weight_hh"]]}
    states = [tensor for name, tensor in weights.items() if name.startswith("weight_hh")]
    projections = [tensor for name, tensor in weights.items() if name.startswith("weight_hr")]
    sizes = {"hidden_size": projections, "proj_size": states} if projections else {"hidden_size": states}
    return {"input_size": [weights["weight_ih_l0"]], **sizes}


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Without oneDNN, which computes all steps and gates of an LSTM in one operator."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


class KeptSize(int):
    """A number that knows the attribute it was read from, as long as nothing is computed with it."""

    origin: Origin


def mark_sizes_(model: nn.Module) -> None:
    """Make every whole number that a module keeps a `KeptSize`."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if type(value) is int:
                size = KeptSize(value)
                size.origin = (name, attribute)
                vars(module)[attribute] = size
