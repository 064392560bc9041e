"""Coupled channels in the notations of modern networks; cutting must equal masking in each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ChannelGroup, ScoreTable, Structures

WIDTH, HEADS, DIM = 24, 3, 8


class Attention(nn.Module):
    """Attention heads in one of several notations; a fused projection unless keys have fewer heads."""

    def __init__(self, spelling: str, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.spelling, self.num_heads, self.num_kv_heads, self.head_dim = spelling, HEADS, kv_heads, DIM
        self.scaling = DIM**-0.5
        self.q, self.kv = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, 2 * kv_heads * DIM)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        match self.spelling:
            case "unbind":
                parts = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim)
                q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
            case "chunk":
                q, k, v = (y.view(n, t, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
            case "flat batch":  # heads beside samples, as torch's own module and older code do
                q, k, v = self.qkv(x).chunk(3, dim=-1)
                q, k, v = (y.reshape(n, t, self.num_heads, DIM).transpose(1, 2) for y in (q, k, v))
                q, k, v = (y.reshape(n * self.num_heads, t, DIM) for y in (q, k, v))
                heads = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * self.scaling).softmax(-1), v)
                heads = heads.view(n, self.num_heads, t, DIM).transpose(1, 2).reshape(n, t, -1)
                return x + self.out(heads)
            case "einsum":
                q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).unbind(2)
                weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scaling * self.temperature).softmax(-1)
                return x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(n, t, -1))
            case _:  # grouped queries
                q = self.q(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
                k, v = self.kv(x).view(n, t, 2, self.num_kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
                k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return x + self.out(heads.transpose(1, 2).flatten(2))


def network(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), middle, nn.Linear(WIDTH, 4))


def group_of(structures: Structures, name: str) -> ChannelGroup:
    assert name in {g.name for g in structures.groups}, structures.frozen
    return next(g for g in structures.groups if g.name == name)


def cut(model: nn.Module, structures: Structures, inputs: Any, group: str, width: int) -> nn.Module:
    """Remove the first units of one group, and check against the masked network."""
    count = group_of(structures, group).num_units
    scores = ScoreTable(scorer="index", channels={group: tuple(map(float, range(count)))})
    plan = make_plan(structures, scores, {group: width})
    pruned = apply_plan(model, plan).eval()
    torch.testing.assert_close(pruned(inputs), masked_dense(model, plan).eval()(inputs))
    return pruned


@pytest.mark.parametrize("spelling", ["unbind", "chunk", "flat batch", "einsum"])
def test_heads_of_a_fused_projection(spelling: str) -> None:
    model, inputs = network(Attention(spelling)), torch.randn(2, 7, 5)
    structures = list_structures(model, inputs)
    heads = group_of(structures, "1:heads")
    assert (heads.kind, heads.num_units) == ("heads", HEADS)
    fused = next(m for m in heads.members if (m.module, m.side) == ("1.qkv", "out"))
    assert fused.units[1] == tuple(part * HEADS * DIM + DIM + i for part in range(3) for i in range(DIM))
    pruned = cut(model, structures, inputs, "1:heads", 1)
    assert (pruned[1].num_heads, pruned[1].head_dim, pruned[1].qkv.out_features) == (1, DIM, 3 * DIM)


def test_a_key_head_is_removed_with_all_its_query_heads() -> None:
    middle = Attention("grouped", kv_heads=1)
    middle.num_heads, middle.num_kv_heads = 6, 2
    middle.q, middle.kv, middle.out = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 32), nn.Linear(48, WIDTH)
    model, inputs = network(middle), torch.randn(2, 7, 5)
    structures = list_structures(model, inputs)
    queries = next(m for m in group_of(structures, "1:heads").members if (m.module, m.side) == ("1.q", "out"))
    assert queries.units == (tuple(range(24)), tuple(range(24, 48)))
    pruned = cut(model, structures, inputs, "1:heads", 1)
    assert (pruned[1].num_heads, pruned[1].num_kv_heads) == (3, 1)


class Gated(nn.Module):
    def __init__(self, split: Callable[["Gated", Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.up, self.down, self.hidden_size, self.split = nn.Linear(WIDTH, 20), nn.Linear(10, WIDTH), 10, split

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.split(self, self.up(x))
        return self.down(value * F.silu(gate))


@pytest.mark.parametrize(
    "split",
    [
        lambda net, x: x.chunk(2, dim=-1),
        lambda net, x: x.split(net.hidden_size, dim=-1),
        lambda net, x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
        lambda net, x: x.view(*x.shape[:-1], 2, -1).unbind(-2),
    ],
    ids=["chunk", "size in an attribute", "slices", "view"],
)
def test_both_halves_of_a_gated_layer_shrink(split: Callable[[Gated, Tensor], tuple[Tensor, Tensor]]) -> None:
    model, inputs = network(Gated(split)), torch.randn(2, 7, 5)
    structures = list_structures(model, inputs)
    up = next(m for m in group_of(structures, "1.up").members if (m.module, m.side) == ("1.up", "out"))
    assert up.units == tuple((i, i + 10) for i in range(10))
    assert cut(model, structures, inputs, "1.up", 4)[1].up.out_features == 8


class Embedded(nn.Module):
    """Bare parameters on the stream: a class token, positions, a layer scale; a norm by hand before the head."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.gain

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-5))
        self.norm = self.Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(x + self.scale * self.mix(x))[:, 0])


def test_bare_parameters_and_norms_shrink_with_the_stream() -> None:
    torch.manual_seed(0)
    model, inputs = Embedded(), torch.randn(2, 3, 8, 8)
    structures = list_structures(model, inputs)
    pruned = cut(model, structures, inputs, "patches", 10)
    shapes = [tuple(p.shape) for p in (pruned.token, pruned.positions, pruned.scale, pruned.norm.gain)]
    assert shapes == [(1, 1, 10), (1, 5, 10), (10,), (10,)]


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH, elementwise_affine=False), nn.RMSNorm(WIDTH), nn.GroupNorm(1, WIDTH)]
)
def test_a_norm_over_channels_reads_only_those_that_stay(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, WIDTH), norm, nn.Linear(WIDTH, 4)), torch.randn(6, 5)
    cut(model, list_structures(model, inputs), inputs, "0", 10)


@pytest.mark.parametrize(
    ("layers", "units"),
    [
        ((nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 5, 1)), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 1)), [(0,), (1,)]),
        ((nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 5, 1)), [(0, 4), (1, 5)]),
        ((nn.Conv2d(3, 8, 1), nn.Unfold(2), nn.Flatten(), nn.Linear(8 * 4 * 9, 5)), [(0,), (1,)]),
        ((nn.Conv2d(3, 8, 1), nn.GLU(1), nn.Conv2d(4, 5, 1)), [(0, 4), (1, 5)]),
        ((nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1)), [(0, 1), (2, 3)]),
        ((nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 6, 2, groups=2)), [(0, 4), (1, 5)]),
    ],
    ids=["pixel shuffle", "pixel unshuffle", "channel shuffle", "unfold", "glu", "group norm", "grouped transposed"],
)
def test_channels_are_followed_through(layers: tuple[nn.Module, ...], units: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*layers), torch.randn(2, 3, 4, 4)
    structures = list_structures(model, inputs)
    writer = next(m for m in group_of(structures, "0").members if (m.module, m.side) == ("0", "out"))
    assert list(writer.units[:2]) == units
    cut(model, structures, inputs, "0", writer.units.index(writer.units[-1]))


def test_unpooling_with_indices_of_a_pooling_ties_their_channels() -> None:
    class Unpooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle, self.up = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x, places = F.max_pool2d(self.down(x), 2, return_indices=True)
            return self.up(F.max_unpool2d(self.middle(x), places, 2))

    torch.manual_seed(0)
    model, inputs = Unpooling(), torch.randn(2, 3, 4, 4)
    structures = list_structures(model, inputs)
    assert [g.name for g in structures.groups] == ["down"]
    assert cut(model, structures, inputs, "down", 2).middle.weight.shape[:2] == (2, 2)


def test_selecting_only_to_read_a_shape_freezes_nothing() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x.view(*x[:, :, -1].shape, -1))

    assert [g.name for g in list_structures(Asking(), torch.randn(2, 7, 5)).groups] == ["first"]


def test_a_size_used_as_a_number_is_detected_by_trying() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.second(x * x.shape[1] ** 0.5))

    torch.manual_seed(0)
    structures = list_structures(Scaled(), torch.randn(4, 5))
    assert [g.name for g in structures.groups] == ["second"]
    assert "cutting differs from masking" in next(row.reason for row in structures.frozen if row.name == "first")


def test_values_cached_for_evaluation_are_dropped_by_the_cut() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)
            self.table, self.cache = nn.Parameter(torch.randn(8)), {}

        def train(self, mode: bool = True) -> nn.Module:
            if mode:
                self.cache = {}
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.cache.setdefault("bias", self.table.exp()) if not self.training else self.table.exp()
            return self.last(self.first(x) + bias)

    torch.manual_seed(0)
    model, inputs = Caching().eval(), torch.randn(4, 5)
    with torch.no_grad():
        model(inputs)
    assert cut(model, list_structures(model, inputs), inputs, "first", 3).table.shape == (3,)


class Output(nn.Module):
    """Adds a layer's input to its output if told to, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.norm(self.dense(x) + shortcut)


class Layer(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.up, self.output, self.adds = nn.Linear(WIDTH, WIDTH), Output(), adds

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).relu()
        return self.output(inner, x if self.adds else inner)


class Stack(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Layer(adds) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_layers_of_a_list_are_blocks_if_they_write_the_channels_they_read() -> None:
    torch.manual_seed(0)
    model, inputs = Stack(adds=True), torch.randn(4, 5)
    structures = list_structures(model, inputs)
    assert [b.name for b in structures.blocks] == ["layers.0", "layers.1", "layers.2"]
    scores = ScoreTable(scorer="index", channels={g.name: tuple(map(float, range(WIDTH))) for g in structures.groups})
    plan = make_plan(structures, scores, {g.name: 7 for g in structures.groups}, ["layers.0", "layers.2"])
    torch.testing.assert_close(apply_plan(model, plan).eval()(inputs), masked_dense(model, plan).eval()(inputs))
    # Without a layer that writes channels of its own, two groups that are cut apart would have to be one.
    other = list_structures(Stack(adds=False), inputs)
    assert not other.blocks
    assert "would have to change" in next(row.reason for row in other.frozen if row.name == "layers.1")


class AsWide(nn.Module):
    """Takes the width of its attention from its input, as the first vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.qkv(x).reshape(n, t, 3, self.num_heads, width // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        heads = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        return self.norm(x + self.proj(heads.transpose(1, 2).reshape(n, t, width)))


def test_heads_and_stream_shrink_together_if_one_sets_the_size_of_the_other() -> None:
    model, inputs = network(nn.Sequential(AsWide(), AsWide())), torch.randn(2, 7, 5)
    structures = list_structures(model, inputs)
    heads = group_of(structures, "1.0:heads")
    assert heads.num_units == HEADS and {m.module for m in heads.members} >= {
        "0",
        "1.0.qkv",
        "1.1.qkv",
        "1.1.norm",
        "2",
    }
    pruned = cut(model, structures, inputs, "1.0:heads", 2)
    assert (pruned[0].out_features, pruned[1][1].num_heads) == (2 * DIM, 2)


class Recurrent(nn.Module):
    """Creates a constant with a size from an attribute, and views with sizes from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.view_shape = 8, [7, 8]
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 1, self.hidden_size) + 1
        return self.last((self.first(x) + state).view(len(x), *self.view_shape))


def test_sizes_in_attributes_of_constants_and_views_shrink() -> None:
    torch.manual_seed(0)
    model, inputs = Recurrent(), torch.randn(2, 7, 5)
    pruned = cut(model, list_structures(model, inputs), inputs, "first", 3)
    assert (pruned.hidden_size, pruned.view_shape) == (3, [7, 3])


class MaskedWeight(nn.Linear):
    """Computes with only a part of its weight."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.mask = nn.Parameter((torch.rand(num_out, num_in) > 0.5).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def test_a_weight_with_a_mask_is_cut_with_it() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(MaskedWeight(5, 8), MaskedWeight(8, 4)), torch.randn(6, 5)
    pruned = cut(model, list_structures(model, inputs), inputs, "0", 3)
    assert pruned[0].mask.shape == (3, 5) and pruned[1].mask.shape == (4, 3)


class Statistic(nn.Module):
    """Reads all its channels in one function."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 1), nn.Conv2d(8, 4, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.read(x).shape[1] == 1:  # spatial attention
            x = x * self.gate(torch.cat([self.read(x), x.max(1, keepdim=True)[0]], 1)).sigmoid()
        return self.last(self.read(x) * x)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean(dim=1, keepdim=True),
        lambda x: x - torch.var_mean(x, (1, 2, 3), keepdim=True)[1],
        lambda x: F.normalize(x, dim=1),
        lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
        lambda x: F.local_response_norm(x, 3),
    ],
    ids=["mean", "centre", "normalize", "layer norm", "local response norm"],
)
def test_a_statistic_over_channels_uses_only_those_that_stay(read: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, inputs = Statistic(read), torch.randn(2, 3, 6, 6)
    structures = list_structures(model, inputs)
    assert cut(model, structures, inputs, "first", 3).first.out_channels == 3


class Standardised(nn.Conv2d):
    """Weights standardised over all inputs of an output."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_weight_standardisation_uses_only_inputs_that_stay() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 4, 3)), torch.randn(2, 3, 6, 6)
    assert cut(model, list_structures(model, inputs), inputs, "0", 3)[2].weight.shape == (4, 3, 3, 3)


class Interleaved(nn.Module):
    """Grouped convolutions around a channel shuffle, with different views of the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 24, 1, groups=2), nn.BatchNorm2d(24)
        self.depthwise, self.last = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        n, channels, *places = x.shape
        x = x.view(n, 2, channels // 2, *places).transpose(1, 2).reshape(n, channels, *places)
        return self.last(self.depthwise(x))


def test_a_shuffle_between_grouped_convolutions() -> None:
    torch.manual_seed(0)
    model, inputs = Interleaved(), torch.randn(2, 4, 6, 6)
    structures = list_structures(model, inputs)
    first = next(m for m in group_of(structures, "first").members if (m.module, m.side) == ("first", "out"))
    assert first.units[0] == (0, 6, 12, 18)  # the same filter in both groups, before the shuffle and after it
    assert cut(model, structures, inputs, "first", 3).last.weight.shape == (4, 6, 1, 1)
