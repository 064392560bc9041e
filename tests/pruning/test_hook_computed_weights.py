"""Weights computed by hooks and parametrizations are cut, saved and counted as plain weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.modules.hook_computed_weights import describe_hooks
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ScoreTable


def _masked(layer: nn.Module) -> nn.Module:
    for part in ("weight", "weight", "bias"):  # masks one after the other
        prune.random_unstructured(layer, part, 0.3)
    return layer


def _recurrent(weight_norm: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = weight_norm(nn.LSTM(6, 8, batch_first=True), "weight_hh_l0"), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    return Last()


def _layers(computed: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(computed(nn.Linear(6, 8)), nn.ReLU(), computed(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "old weight_norm": lambda: _layers(utils.weight_norm),
    "old spectral_norm": lambda: _layers(utils.spectral_norm),
    "masks": lambda: _layers(_masked),
    "weight_norm": lambda: _layers(parametrizations.weight_norm),
    "spectral_norm": lambda: _layers(parametrizations.spectral_norm),
    "orthogonal": lambda: _layers(parametrizations.orthogonal),
    "old weight_norm of an LSTM": lambda: _recurrent(utils.weight_norm),
    "weight_norm of an LSTM": lambda: _recurrent(parametrizations.weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_computed_weights_are_cut_and_saved_as_their_values(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name](), torch.randn(4, 5, 6)
    model(inputs).sum().backward()  # what PyTorch computed for the last call has a history, and cannot be copied
    model.eval()
    names, hooks = list(model.state_dict()), describe_hooks(model)
    structures = list_structures(model, inputs)
    first = "layer" if "LSTM" in name else "0"
    assert first in {g.name for g in structures.groups}
    scores = {g.name: tuple((i * 5 % 8) / 8 for i in range(g.num_units)) for g in structures.groups}
    plan = make_plan(structures, ScoreTable(scorer="mixed", channels=scores), {g: 5 for g in scores})
    with torch.no_grad():
        pruned, masked = apply_plan(model, plan).eval(), masked_dense(model, plan).eval()
        torch.testing.assert_close(pruned(inputs), masked(inputs))
        torch.testing.assert_close(with_slim_attention(model)(inputs), model(inputs))
        save_pruned(pruned, plan, inputs, tmp_path)
        torch.testing.assert_close(load_saved(tmp_path, NETWORKS[name])(inputs), pruned(inputs))
    report = describe(model, pruned, plan, inputs)
    assert (report.params_before, report.macs_before) == count_macs(model, inputs)
    assert (names, hooks) == (list(model.state_dict()), describe_hooks(model))  # the model is left as it was
    assert not describe_hooks(pruned)
