"""MACs by operator: against the definition, and reported savings against real ones."""

from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.modules.recurrent_sizes import without_fused_kernels
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ScoreTable


class Calling(nn.Module):
    """A network without layers: a function of bare parameters and inputs."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


# Of two samples; the count is for one.
CASES: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], int]] = {
    "GRU": (nn.GRU(16, 64, batch_first=True), ((2, 10, 16),), 10 * 3 * (16 + 64) * 64),
    "RNN of two layers": (nn.RNN(5, 7, 2, batch_first=True), ((2, 4, 5),), 4 * ((5 + 7) * 7 + (7 + 7) * 7)),
    "LSTM, both directions": (
        nn.LSTM(5, 7, batch_first=True, bidirectional=True),
        ((2, 4, 5),),
        2 * 4 * 4 * (5 + 7) * 7,
    ),
    "LSTM with a projection": (
        nn.LSTM(5, 7, proj_size=3, batch_first=True),
        ((2, 4, 5),),
        4 * (4 * (5 + 3) * 7 + 3 * 7),
    ),
    "LSTM cell": (nn.LSTMCell(5, 7), ((2, 5),), 4 * (5 + 7) * 7),
    "linear": (Calling(F.linear, (32, 16)), ((2, 16),), 32 * 16),
    "matrix by vector": (Calling(torch.matmul, (16,)), ((2, 3, 16),), 3 * 16),
    "convolution": (Calling(F.conv2d, (8, 3, 3, 3)), ((2, 3, 8, 8),), 36 * 8 * 27),
    "depthwise": (nn.Conv1d(6, 6, 3, groups=6), ((2, 6, 9),), 7 * 6 * 3),
    "transposed, in groups": (nn.ConvTranspose3d(4, 6, 2, 2, groups=2), ((2, 4, 3, 3, 3),), 27 * 4 * 3 * 8),
    "bilinear": (nn.Bilinear(3, 4, 5), ((2, 3), (2, 4)), 3 * 4 * 5),
    "einsum": (Calling(lambda x, y: torch.einsum("bqd,bkd->bqk", x, y)), ((2, 5, 8), (2, 6, 8)), 5 * 6 * 8),
    "attention": (Calling(_attend), ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8)), 3 * 5 * 6 * (8 + 8)),
    "attention layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ((2, 5, 8),),
        5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_of_operators_equal_their_definition(name: str) -> None:
    model, shapes, expected = CASES[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    assert count_macs(model, inputs)[1] == expected
    with without_fused_kernels():
        assert count_macs(model, inputs)[1] == expected
    with torch.inference_mode():  # composed operators arrive whole
        assert count_macs(model, inputs)[1] == expected


class Attending(nn.Module):
    """Costs outside modules: attention over a stream, a computed weight, a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.positions, self.to_bias = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))
        self.scaled = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.to_bias(self.positions)  # the latter once a batch
        for layer in self.layers:
            x = layer(x)
        return self.head(F.linear(x, self.scaled * 0.5).relu())


class Mixing(nn.Module):
    """A layer along positions: with fewer channels it costs less, but loses no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, 8), nn.Linear(7, 7), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.mix(x.transpose(1, 2)).transpose(1, 2))


class Routed(nn.Module):
    """Sends each row to one of two experts, and adds their outputs to rows of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(5, 8), nn.Linear(5, 2), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        chosen, total = self.router(x).argmax(-1).flatten(), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (places,) = torch.where(chosen == number)
            total.index_add_(0, places, expert(rows[places]))
        return self.head(total.view(len(x), -1, total.shape[1]))


def _network(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "attending":
        return Attending(), torch.randn(4, 7, 5)
    if name == "routed":
        return Routed(), torch.randn(4, 7, 5)
    if name == "mixing":
        return Mixing(), torch.randn(4, 7, 5)
    if name == "gru":
        return nn.Sequential(nn.Linear(5, 6), Last(nn.GRU(6, 8, 2, batch_first=True)), nn.Linear(8, 3)), torch.randn(
            4, 7, 5
        )
    return networks.build(name)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize(
    "name", ["attending", "mixing", "routed", "gru", "encoder", "resnext", "separable", "gated", "squeeze_excite"]
)
def test_macs_of_a_unit_and_a_block_equal_what_their_removal_saves(name: str) -> None:
    model, inputs = _network(name)
    structures = list_structures(model, inputs)
    params, macs = count_macs(model, inputs)
    assert (structures.num_params, structures.num_macs) == (params, macs)
    scores = ScoreTable(scorer="index", channels={g.name: tuple(range(g.num_units, 0, -1)) for g in structures.groups})
    for group in structures.groups:
        pruned = apply_plan(model, make_plan(structures, scores, {group.name: group.num_units - 1}))
        assert count_macs(pruned, inputs) == (params - group.params_per_unit, pytest.approx(macs - group.macs_per_unit))
    for block in structures.blocks:
        pruned = apply_plan(model, make_plan(structures, scores, {}, [block.name]))
        assert count_macs(pruned, inputs) == (params - block.params, macs - block.macs)
