"""Recurrent layers with all kinds of initial states, and sizes stored in different places."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import PruningPlan, ScoreTable, Structures


class Net(nn.Module):
    """A layer before, the recurrent layer, its last output, and a layer after. start: the initial states."""

    def __init__(self, layer: nn.Module, width: int, start: Callable[["Net", Tensor], object] | None = None) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, 1, 8)) if start is _learned else None
        self.before, self.layer, self.after = nn.Linear(3, 6), layer, nn.Linear(width, 4)
        self.start, self.state_size = start, 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        x = x if self.layer.batch_first else x.transpose(0, 1)
        out = self.layer(x, self.start(self, x)) if self.start else self.layer(x)
        return self.after(out[0][:, -1] if self.layer.batch_first else out[0][-1])


class Steps(nn.Module):
    """A cell, step by step, with initial states created in the size that `make` gives."""

    def __init__(self, cell: nn.RNNCellBase, make: Callable[["Steps", Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.cell, self.after, self.make = nn.Linear(3, 6), cell, nn.Linear(8, 4), make
        self.hidden = 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        h, c = self.make(self, x), self.make(self, x)
        for step in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, step], (h, c))
            else:
                h = self.cell(x[:, step], h)
        return self.after(h)


class Sorted(nn.Module):
    """Packed sequences of several lengths; both final states are used."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 6), nn.Linear(24, 4)
        self.layer = nn.LSTM(6, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.before(x), lengths, batch_first=True, enforce_sorted=False)
        out, (h, _) = self.layer(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        return self.after(torch.cat([h[-1], padded.amax(1)], dim=1))


def _learned(net: Net, x: Tensor) -> Tensor:
    return net.learned.expand(-1, len(x), -1).contiguous()


def _zeros(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, x.shape[0], net.state_size), x.new_zeros((1, x.shape[0], net.layer.hidden_size))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Net(nn.LSTM(6, 8, batch_first=True), 8),
    "gru": lambda: Net(nn.GRU(6, 8), 8),
    "tanh": lambda: Net(nn.RNN(6, 8, batch_first=True), 8),
    "relu, no bias": lambda: Net(nn.RNN(6, 8, nonlinearity="relu", bias=False), 8),
    "square": lambda: Net(nn.GRU(6, 6, batch_first=True), 6),  # the input is as wide as the state
    "two layers, both ways": lambda: Net(nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, dropout=0.1), 16),
    "gru, two layers, both ways": lambda: Net(nn.GRU(6, 8, 2, bidirectional=True), 16),
    "projection": lambda: Net(nn.LSTM(6, 10, proj_size=8, batch_first=True), 8),
    "lstm, zeros": lambda: Net(nn.LSTM(6, 8, batch_first=True), 8, _zeros),
    "gru, full": lambda: Net(nn.GRU(6, 8, batch_first=True), 8, lambda n, x: x.new_full((1, len(x), n.state_size), 0)),
    "gru, expanded": lambda: Net(
        nn.GRU(6, 8, batch_first=True), 8, lambda n, x: torch.zeros(1).expand(1, len(x), n.state_size).contiguous()
    ),
    "gru, learned": lambda: Net(nn.GRU(6, 8, batch_first=True), 8, _learned),
    "gru cell": lambda: Steps(nn.GRUCell(6, 8), lambda n, x: x.new_zeros(len(x), n.cell.hidden_size)),
    "lstm cell": lambda: Steps(nn.LSTMCell(6, 8), lambda n, x: torch.zeros(x.shape[0], n.hidden, dtype=x.dtype)),
    "rnn cell": lambda: Steps(nn.RNNCell(6, 8), lambda n, x: x.new_empty(x.shape[0], n.hidden).zero_()),
    "from the input's state": lambda: Steps(nn.GRUCell(6, 6), lambda n, x: torch.zeros_like(x[:, 0])),
    "packed": Sorted,
}


def build(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if name == "square":
        model.state_size = 6
    if name == "from the input's state":
        model.after = nn.Linear(6, 4)
    x = torch.randn(4, 7, 3)
    return model.eval(), (x, torch.tensor([7, 3, 5, 1])) if name == "packed" else x


def halved(structures: Structures) -> PruningPlan:
    scores = {g.name: tuple((i * 7 % 5) + i / 100 for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: max(1, g.num_units // 2 - i % 2) for i, g in enumerate(structures.groups)}
    return make_plan(structures, ScoreTable(scorer="mixed", channels=scores), widths)


def answer(model: nn.Module, inputs: object) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return output


@pytest.mark.parametrize("name", NETWORKS)
def test_states_and_inputs_of_a_recurrent_layer_can_shrink(name: str) -> None:
    model, inputs = build(name)
    structures = list_structures(model, inputs)
    if name == "from the input's state":  # the state is what the input is: they go together
        assert [g.name for g in structures.groups] == ["before"]
    elif name == "projection":
        assert [(g.name, g.num_units) for g in structures.groups] == [("before", 6), ("layer", 8)]
    else:
        inner = "cell" if isinstance(model, Steps) else "layer"
        assert {g.name for g in structures.groups} == {"before", inner}
    plan = halved(structures)
    pruned, masked = apply_plan(model, plan).eval(), masked_dense(model, plan).eval()
    for other in (inputs, inputs[:3, :5] if isinstance(inputs, Tensor) else inputs):
        torch.testing.assert_close(answer(pruned, other), answer(masked, other))
    assert not torch.allclose(answer(pruned, inputs), answer(model, inputs))


class Cell(nn.Module):
    """A recurrent layer of convolutions that creates its states with a size from an attribute."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.hidden_dim, self.gates = width, nn.Conv2d(width_in + width, 4 * width, 3, padding=1)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = (len(x), self.hidden_dim, *x.shape[-2:])
        return torch.zeros(size), torch.zeros(size)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        state, memory = states
        i, f, o, g = self.gates(torch.cat([x, state], 1)).split(self.hidden_dim, 1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        return o.sigmoid() * memory.tanh(), memory


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)
        self.first, self.second = Cell(6, 8), Cell(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first.start(x), self.second.start(x)
        for frame in x.unbind(1):
            one = self.first(self.stem(frame), one)
            two = self.second(one[0], two)
        return self.last(two[0])


def test_states_concatenated_with_inputs_shrink_with_the_layer() -> None:
    model, inputs = Video().eval(), torch.randn(2, 3, 3, 6, 6)
    structures = list_structures(model, inputs)
    assert {"stem": 6, "first.gates": 8, "second.gates": 10}.items() <= {
        g.name: g.num_units for g in structures.groups
    }.items()
    plan = halved(structures)
    pruned = apply_plan(model, plan)
    for cell, width in ((pruned.first, 8), (pruned.second, 10)):
        assert cell.gates.out_channels == 4 * cell.hidden_dim < 4 * width
    with torch.no_grad():
        for other in (inputs, torch.randn(1, 5, 3, 4, 9)):
            torch.testing.assert_close(pruned(other), masked_dense(model, plan)(other), atol=1e-5, rtol=1e-4)


def test_a_layer_that_only_reads_fewer_channels_is_frozen_with_a_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer, self.last = nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.before(x), torch.zeros(1, len(x), 8))[0])

    structures = list_structures(Fixed(), torch.randn(2, 4, 5))
    assert [group.name for group in structures.groups] == ["before"]
    (reason,) = [row.reason for row in structures.frozen if row.name == "layer"]
    assert "Expected hidden size" in reason
