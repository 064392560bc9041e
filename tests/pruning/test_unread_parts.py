"""One example never shows what an input of another size would read, so unread parts are kept."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import find_structures, list_structures
from deploypipe.records import PruningPlan, ScoreTable, Structures

ROWS, WIDTH = 12, 16


def halved(structures: Structures) -> PruningPlan:
    scores = {g.name: tuple(float(i) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: max(1, g.num_units // 2) for g in structures.groups}
    return make_plan(structures, ScoreTable(scorer="order", channels=scores), widths)


class Tagger(nn.Module):
    """Embeds tokens, adds `read` of a table with a row per position, and gives each token 5 scores."""

    def __init__(self, read: Callable[["Tagger", int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.tokens, self.table = nn.Embedding(30, WIDTH), nn.Parameter(torch.randn(1, ROWS, WIDTH))
        self.as_weight, self.level = nn.Embedding(ROWS, WIDTH), nn.Parameter(torch.randn(3, WIDTH))
        self.register_buffer("mask", torch.randn(ROWS, ROWS))
        self.register_buffer("frequencies", torch.randn(ROWS, WIDTH))
        self.move = nn.Linear(WIDTH, WIDTH)
        self.hidden, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.tokens(ids) + self.read(self, ids.shape[1])).relu())


def _stretched(m: Tagger, n: int) -> Tensor:
    return F.interpolate(m.table[:, : (n + 1) // 2].movedim(1, 2), n).movedim(2, 1)


READS: dict[str, Callable[[Tagger, int], Tensor]] = {
    "slice": lambda m, n: m.table[:, :n],
    "narrow": lambda m, n: m.table.narrow(1, 0, n),
    "from the middle": lambda m, n: m.table[:, ROWS // 2 - n // 2 : ROWS // 2 - n // 2 + n],
    "every third": lambda m, n: m.table[:, :: ROWS // n],
    "a part of a split": lambda m, n: m.table.split([n, ROWS - n], 1)[0] if n < ROWS else m.table,
    "a chunk": lambda m, n: m.table.chunk(2, 1)[0][:, :n] if n <= ROWS // 2 else m.table[:, :n],
    "index": lambda m, n: m.table[:, torch.arange(n)],
    "gather": lambda m, n: m.table.gather(1, torch.arange(n)[None, :, None].expand(1, n, m.table.shape[2])),
    "embedding": lambda m, n: m.as_weight(torch.arange(n)),
    "weight of an embedding": lambda m, n: m.as_weight.weight[:n],
    "one row": lambda m, n: m.level[n // 5][None, None],
    "a row of those unbound": lambda m, n: m.level.unbind(0)[n // 5],
    "moved first": lambda m, n: m.move(m.table)[:, :n],
    "copied first": lambda m, n: m.table.repeat(2, 1, 1).clone()[:, :n].mean(0, keepdim=True),
    "turned": lambda m, n: m.table.transpose(1, 2)[:, :, :n].transpose(1, 2),
    "mean": lambda m, n: m.table[:, :n].mean(1, keepdim=True),
    "mask": lambda m, n: m.mask[:n, :n] @ m.table[:, :n],
    "frequencies": lambda m, n: m.frequencies[:n].cos()[None],
    "stretched": _stretched,
    "strided": lambda m, n: m.as_weight.weight.as_strided((n, 1), (WIDTH, 1))[None],
    "padded": lambda m, n: F.pad(m.table[:, :n], (0, 0, 0, 0)),
    "cropped": lambda m, n: F.pad(m.table, (0, 0, 0, n - ROWS)),
    "a window": lambda m, n: m.as_weight.weight[:, :1].unfold(0, n, 1)[:1].transpose(1, 2),
    "rolled": lambda m, n: m.table.roll(n, 1)[:, :n],
    "concatenated": lambda m, n: torch.cat([m.table, m.as_weight.weight[None]], 1)[:, :n],
}


@pytest.mark.parametrize("read", READS)
def test_parts_unread_by_a_short_input_are_kept_for_a_long_one(read: str) -> None:
    model = Tagger(READS[read]).eval()
    short, long = torch.randint(0, 30, (2, 4)), torch.randint(0, 30, (2, ROWS))
    structures = list_structures(model, short)
    assert {"tokens", "hidden"} <= {group.name for group in structures.groups}
    plan = halved(structures)
    with torch.no_grad():
        for inputs in (short, long):
            cut, masked = apply_plan(model, plan)(inputs), masked_dense(model, plan)(inputs)
            torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-4)
    sizes = {name: tensor.shape for name, tensor in apply_plan(model, plan).state_dict().items()}
    assert (sizes["table"][1], sizes["as_weight.weight"][0], sizes["level"][0]) == (ROWS, ROWS, 3)
    assert sizes["mask"] == (ROWS, ROWS)
    assert sizes["frequencies"][0] == ROWS


class Parts(nn.Module):
    """Two halves of one projection, of which both or only one is used."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.width = both, 16
        self.first, self.last = nn.Linear(6, 32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kept, gate = x.split(self.width, 1)
        return self.last(kept * gate if self.both else kept)


def test_a_split_with_all_parts_used_can_shrink() -> None:
    model, inputs = Parts(both=True).eval(), torch.randn(4, 6)
    plan = halved(list_structures(model, inputs))
    assert apply_plan(model, plan).last.in_features == 8


def test_unread_channels_are_frozen_with_a_plain_reason() -> None:
    found = find_structures(Parts(both=False).eval(), torch.randn(4, 6))
    removable = {i for g in found.groups for m in g.members if m.module == "first" for unit in m.units for i in unit}
    assert removable.isdisjoint(range(16, 32))


def test_a_branch_for_long_inputs_is_followed_if_one_is_given() -> None:
    model = Tagger(lambda m, n: m.move(m.table.sum(1, keepdim=True)) if n > 6 else m.level[:1]).eval()
    short, long = torch.randint(0, 30, (2, 4)), torch.randint(0, 30, (2, ROWS))
    plan = halved(list_structures(model, short, other_inputs=[long]))
    assert {"tokens", "hidden", "move"} <= {edit.module for edit in plan.edits}
    with torch.no_grad():
        for inputs in (short, long):
            cut, masked = apply_plan(model, plan)(inputs), masked_dense(model, plan)(inputs)
            torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-4)


def test_a_group_that_fails_at_another_size_is_frozen() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.last(x if x.shape[1] < 5 else x.reshape(x.shape[0], -1, 8))

    model = Sized().eval()
    assert [group.name for group in list_structures(model, torch.randn(2, 4, 6)).groups] == ["first"]
    (row,) = [
        row
        for row in find_structures(model, torch.randn(2, 4, 6), other_inputs=[torch.randn(2, 5, 6)]).frozen
        if row.name == "first"
    ]
    assert row.reason


def test_a_partly_read_table_is_frozen_by_name() -> None:
    model = Tagger(READS["mean"]).eval()
    found = find_structures(model, torch.randint(0, 30, (2, 4)))
    assert not any(member.side == "table.1" for group in found.groups for member in group.members)


class Shifted(nn.Module):
    """Shifts a share of the channels by one position, as networks for video do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        share = x.shape[1] // 4
        moved = torch.zeros_like(x)
        moved[:, :share, 1:] = x[:, :share, :-1]
        moved[:, share:] = x[:, share:]
        return self.last(moved)


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_channels_with_a_share_on_another_path_are_frozen(name: str) -> None:
    found = find_structures(nn.Sequential(OrderedDict({name: Shifted()})).eval(), torch.randn(2, 3, 8))
    assert not found.groups
    assert ["cutting differs from masking" in row.reason for row in found.frozen if row.name == f"{name}.first"] == [
        True
    ]
