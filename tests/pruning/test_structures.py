"""Structures: what can be removed, what cannot, and the reasons reported."""

import copy
from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import ModelError
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe, masked_dense
from deploypipe.pruning.surgery.module_slicing import cut_, sizes_after
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import find_structures, list_structures
from deploypipe.records import Edit, PruningPlan, ScoreTable, Structures


def names(structures: Structures) -> list[str]:
    return [group.name for group in structures.groups]


def reason(structures: Structures, name: str) -> str:
    return next(row.reason for row in structures.frozen if row.name == name)


def test_option_a_resnet_offers_inner_channels_unpadded_stream_and_identity_blocks() -> None:
    structures = list_structures(*networks.build("pad_resnet"))
    assert names(structures) == ["conv1", *(f"stages.{s}.{b}.conv1" for s in range(3) for b in range(2))]
    stream = structures.groups[0]  # the padding's own channels stay, those of the first stage can go in all of them
    assert next(m.units for m in stream.members if m.module == "fc") == tuple((i + 12,) for i in range(8))
    assert [b.name for b in structures.blocks] == ["stages.0.0", "stages.0.1", "stages.1.1", "stages.2.1"]
    assert reason(structures, "stages.1.0") == "changes the shape from (8, 8, 8) to (16, 4, 4)"
    assert "output" in reason(structures, "fc")


def test_projection_shortcuts_let_the_stream_shrink() -> None:
    structures = list_structures(*networks.build("bottleneck"))
    stream = next(g for g in structures.groups if g.name == "layer1.0.conv3")
    assert {"layer1.0.shortcut.0", "layer1.1.conv3", "layer2.0.conv1"} <= {m.module for m in stream.members}
    assert [b.name for b in structures.blocks] == ["layer1.1", "layer2.1"]


def test_units_follow_gates_groups_flattens_and_concatenations() -> None:
    def units(network: str, group: str, module: str, side: str) -> tuple[tuple[int, ...], ...]:
        found = next(g for g in list_structures(*networks.build(network)).groups if g.name == group)
        return next(m.units for m in found.members if (m.module, m.side) == (module, side))

    assert units("gated", "conv1", "conv1", "out") == tuple((i, i + 8) for i in range(8))
    assert units("resnext", "layer1.0.conv1", "layer1.0.conv2", "in") == tuple((i, i + 4) for i in range(4))
    assert units("flattened", "conv2", "fc1", "in")[1] == tuple(range(16, 32))
    assert units("dense", "layers.1", "fc", "in") == ((10,), (11,), (12,), (13,))


def test_channels_with_common_statistics_are_removed_together() -> None:
    structures = list_structures(*networks.build("normalised"))
    assert [(g.name, g.num_units) for g in structures.groups] == [("conv1", 2), ("conv2", 8)]
    assert structures.groups[0].members[0].units == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_keep_freezes_every_structure_with_a_match() -> None:
    structures = list_structures(*networks.build("pad_resnet"), keep=["stages.0.*", "stages.1.1.bn1"])
    assert names(structures) == ["stages.1.0.conv1", "stages.2.0.conv1", "stages.2.1.conv1"]
    assert [b.name for b in structures.blocks] == ["stages.2.1"]
    assert reason(structures, "stages.1.1.conv1") == "matches keep (stages.1.1.bn1)"


def test_a_frozen_network_is_an_error_with_a_remedy() -> None:
    model, inputs = networks.build("mlp")
    with pytest.raises(ModelError, match=r"requires_grad_\(True\)"):
        list_structures(model.requires_grad_(False), inputs)


def test_a_network_with_nothing_to_remove_is_an_error_with_reasons() -> None:
    with pytest.raises(ModelError, match=r"channels '0': its channels are the network's output"):
        list_structures(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))


class Odd(nn.Module):
    """A hidden layer that is read by a given function of (network, hidden)."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.read(self, F.relu(self.first(x))))))


@pytest.mark.parametrize(
    "read",
    [
        lambda net, h: h.softmax(dim=1),
        lambda net, h: h.view(-1, 8),
        lambda net, h: h + torch.arange(8.0),
        lambda net, h: torch.cumsum(h, dim=1),
    ],
    ids=["softmax", "constant-view", "constant-add", "cumsum"],
)
def test_functions_that_mix_channels_freeze_them(read: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    structures = list_structures(Odd(read), torch.randn(4, 6))
    assert names(structures) == ["second"]
    assert reason(structures, "first")


def test_zero_weights_do_not_hide_a_wrong_coupling() -> None:
    model = Odd(lambda net, h: h.softmax(dim=1))
    nn.init.zeros_(model.second.weight)
    assert "first" not in names(list_structures(model, torch.randn(4, 6)))


def test_flipped_channels_are_followed() -> None:
    torch.manual_seed(0)
    structures = list_structures(Odd(lambda net, h: h.flip(1)), torch.randn(4, 6))
    reader = next(m for m in structures.groups[0].members if (m.module, m.side) == ("second", "in"))
    assert reader.units == tuple((7 - i,) for i in range(8))


@pytest.mark.parametrize("parts", [2, 3])
def test_chunks_shrink_together(parts: int) -> None:
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = -(-8 // parts)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 3)
            self.left, self.right = nn.Linear(width, 4), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).chunk(parts, dim=1)[:2]
            return self.last(F.relu(self.left(left) + self.right(right)))

    structures = list_structures(Chunked(), torch.randn(4, 6))
    if parts == 2:  # they are read apart, but chunk() halves whatever is left
        assert names(structures) == ["first", "left"]
        assert structures.groups[0].members[0].units == ((0, 4), (1, 5), (2, 6), (3, 7))
    else:
        assert names(structures) == ["left"]
        assert "unequal parts" in reason(structures, "first")


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(F.relu(self.mix(self.embed(tokens))) + self.embed(tokens))

    model, tokens = Tied(), torch.randint(0, 9, (2, 5))
    structures = list_structures(model, tokens)
    plan = make_plan(structures, ScoreTable(scorer="index", channels={"embed": tuple(range(8))}), {"embed": 3})
    pruned = apply_plan(model, plan)
    assert pruned.head.weight is pruned.embed.weight
    assert (pruned.head.in_features, pruned.embed.embedding_dim, pruned.mix.weight.shape) == (3, 3, (3, 3))
    torch.testing.assert_close(pruned(tokens), masked_dense(model, plan)(tokens))


def test_a_weight_tied_to_the_input_is_frozen() -> None:
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    tied[2].weight = tied[0].weight
    structures = list_structures(tied, torch.randn(2, 8))
    assert names(structures) == ["4"]
    assert "inputs of fixed size" in reason(structures, "0")


def test_computed_weights_become_plain_when_cut() -> None:
    computed = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(computed[0])
    inputs = torch.randn(2, 6)
    structures = list_structures(computed, inputs)
    group = structures.groups[0]
    plan = make_plan(structures, ScoreTable(scorer="flat", channels={group.name: (0.0,) * 8}), {group.name: 5})
    assert computed[0].weight.shape == (8, 6)
    pruned = apply_plan(computed, plan)
    assert pruned[0].weight.shape == (5, 6)
    torch.testing.assert_close(pruned(inputs), masked_dense(computed, plan)(inputs))


@pytest.mark.parametrize("pack", ["tuple", "dict", "one sample"])
def test_inputs_as_tensor_tuple_or_dict(pack: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(self.a(left) * self.b(right))}

    count = 1 if pack == "one sample" else 3
    both = {"left": torch.randn(count, 4), "right": torch.randn(count, 5)}
    structures = list_structures(Two(), both if pack == "dict" else tuple(both.values()))
    assert [m.module for m in structures.groups[0].members] == ["a", "b", "out"]
    assert structures.num_macs == 4 * 8 + 5 * 8 + 8 * 2


def test_an_unknown_operation_freezes_its_channels_with_a_reason() -> None:
    torch.manual_seed(0)
    structures = list_structures(Odd(lambda net, h: torch.fft.fft(h).real), torch.randn(4, 6))
    assert names(structures) == ["second"]
    assert "cannot be followed" in reason(structures, "first")


def test_a_network_that_cannot_be_traced_keeps_its_blocks() -> None:
    class Differentiating(networks.PadResNet):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                gain = torch.ones(1, requires_grad=True)
                torch.autograd.grad((gain * 2).sum(), gain)
            return super().forward(x)

    structures = list_structures(Differentiating(), networks.images())
    assert structures.groups == ()
    assert len(structures.blocks) == 4
    assert reason(structures, "conv1").startswith("could not be traced: RuntimeError")


def test_parameters_and_macs_equal_their_definition() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, 2))
    params, macs = count_macs(model, torch.randn(5, 3, 6, 6))
    assert params == (27 * 8 + 8) + (9 * 8 + 8) + (8 * 4 * 4 + 4)
    assert macs == 27 * 8 * 36 + 9 * 8 * 16 + 8 * 16 * 4 * 4


def test_the_fingerprint_separates_structure_and_weights() -> None:
    def parts(model: nn.Module) -> tuple[str, ...]:
        return tuple(model_fingerprint(model).split("-"))

    torch.manual_seed(0)
    one, other, wider = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 5)
    assert parts(one)[0] == parts(other)[0] != parts(wider)[0]
    assert parts(one)[1] != parts(other)[1]
    other.load_state_dict(one.state_dict())
    assert parts(one) == parts(other)
    assert parts(one)[0] != parts(nn.Linear(3, 4).to(torch.bfloat16))[0]


def test_transformer_layers_called_with_masks_are_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    structures = list_structures(model, torch.randn(2, 5, 8))
    assert [b.name for b in structures.blocks] == ["0.layers.0", "0.layers.1"]
    assert names(structures) == [f"0.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn:heads", "linear1")]


def test_the_stem_is_cut_with_its_reader() -> None:
    model, inputs = networks.build("bottleneck")
    structures = list_structures(model, inputs)
    scores = {"stem": tuple(float(i) for i in range(8))}
    plan: PruningPlan = make_plan(structures, ScoreTable(scorer="index", channels=scores), {"stem": 3})
    assert apply_plan(model, plan).layer1[0].conv1.in_channels == 3
    row = describe(model, masked_dense(model, plan), plan, inputs).rows[0]
    assert (row.name, row.width_before, row.asked, row.realised) == ("stem", 8, 3, 3)


def test_sizes_of_computed_weights_equal_those_of_plain_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 4))
    (group,) = list_structures(model, torch.randn(2, 5)).groups
    edits = [Edit(module=m.module, side=m.side, removed=m.units[0] + m.units[3]) for m in group.members]
    pruned = copy.deepcopy(model)
    cut_(pruned, edits)
    left = {"0.weight": 0.75, "0.bias": 0.75, "2.weight": 0.75}
    assert sizes_after(model, edits) == (sum(p.numel() for p in pruned.parameters()), left)


def test_every_module_with_weights_can_shrink_or_is_frozen_with_a_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(8))
            self.norm, self.layer = nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True)
            self.middle, self.scales = nn.Linear(8, 8), nn.ParameterList([torch.randn(8)])
            self.last, self.head, self.end = nn.LayerNorm(8), nn.Linear(8, 4), nn.LayerNorm(4)
            self.spare, self.idle = nn.RMSNorm(5), nn.LSTM(3, 3)
            self.odd = nn.Linear(8, 8)
            weight = self.odd._parameters.pop("weight")
            self.odd.source, self.odd.weight = weight, weight.detach()
            self.odd.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", layer.source * 2))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.embed(tokens) + self.positions)
            x = self.middle(self.layer(x)[0][:, -1]) * self.scales[0]
            return self.end(self.head(self.last(torch.fft.fft(self.odd(x)).real)))

    torch.manual_seed(0)
    structures = list_structures(Mixed().eval(), torch.randint(0, 9, (4, 5)))
    losing = {m.module for g in structures.groups for m in g.members if m.side != "in" and m.module}
    assert losing == {"embed", "norm", "layer", "middle", "scales", "odd"}  # the last loses inputs only
    listed = {row.name: row.reason for row in structures.frozen}
    assert set(listed) == {"odd", "last", "head", "end", "spare", "idle"}
    assert "its weight is computed by custom code" in listed["odd"]
    assert listed["end"] == "its channels are the network's output"
    assert "fixed size" in listed["last"]
    assert "not read with these inputs" in listed["spare"]
    kinds = {row.name: row.kind for row in structures.frozen}
    assert (kinds["head"], kinds["end"]) == ("channels", "weights")


class Fussy(nn.Module):
    """Accepts only widths that are multiples of four."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 16)})
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        assert x.shape[1] % 4 == 0
        return self.last(x)


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_a_group_restricted_to_some_widths_is_frozen(name: str) -> None:
    found = find_structures(Fussy(name), torch.randn(2, 6))
    assert not found.groups
    assert [row.reason[:38] for row in found.frozen if row.name == f"layers.{name}"] == [
        "the network fails without these channe"
    ]
