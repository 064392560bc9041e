"""A point of a loss curve equals the loss of the pruned network; the dense network is left unchanged."""

from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.least_squares import CrossMoments
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.layer_regressions import is_linear_like
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Constraints, Observe, Random, Search
from deploypipe.records import Curves, LossCurve, ScoreTable, Structures
from deploypipe.scoring import score
from deploypipe.search.allocation import cut_losses
from deploypipe.search.allocation.loss_curves import TEMPERATURE, measure_curves, width_levels

SETTINGS = Search(num_curve_samples=40, num_levels=2)
NOTHING = Moments(
    num_samples=0,
    skipped={},
    inputs={},
    units={},
    labels=None,
    block_hsic=torch.zeros(0, 0),
    block_inputs={},
    block_outputs={},
    shuffled={},
    gates={},
    output_fisher={},
)


def prepared(name: str, count: int = 40) -> tuple[nn.Module, Tensor, Structures, ScoreTable]:
    model, inputs = networks.build(name)
    structures = list_structures(model, inputs)
    torch.manual_seed(3)
    inputs = torch.cat([networks.NETWORKS[name][1]() for _ in range(count // 4)])
    return model, inputs, structures, score(model, structures, NOTHING, Random(), seed=1)


def kl(dense: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        p, q = (m.eval()(inputs).double().div(TEMPERATURE).flatten(0, -2).log_softmax(-1) for m in (dense, other))
    return TEMPERATURE**2 * float((p.exp() * (p - q)).sum(-1).mean())


def points(curves: Curves) -> list[tuple[LossCurve, int, float]]:
    return [(c, k, loss) for c in curves.curves for k, loss in zip(c.kept, c.losses, strict=True)]


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_unrepaired_points_are_the_pruned_networks(name: str) -> None:
    model, inputs, structures, scores = prepared(name)
    curves = measure_curves(model, structures, scores, NOTHING, [(inputs, torch.zeros(40))], SETTINGS)
    assert {c.name for c in curves.curves} == {s.name for s in (*structures.groups, *structures.blocks)}
    for curve, kept, loss in points(curves):
        widths, blocks = ({curve.name: kept}, []) if curve.kind == "channels" else ({}, [curve.name])
        pruned = apply_plan(model, make_plan(structures, scores, widths, blocks))
        assert loss == pytest.approx(max(kl(model, pruned, inputs), 0.0), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["mlp", "pad_resnet", "flattened", "bottleneck", "dense"])
def test_repaired_points_are_the_pruned_networks_with_that_layer_solved(name: str) -> None:
    model, inputs, structures, scores = prepared(name, 200)
    batches = [(inputs, torch.zeros(200))]
    moments = observe_activations(model, structures, batches, Observe(positions_per_sample=1000))
    curves = measure_curves(model, structures, scores, moments, batches, Search(num_levels=2))
    for group in structures.groups:
        readers = [m for m in group.members if m.side == "in"]
        if len(readers) != 1 or not is_linear_like(model.get_submodule(readers[0].module)):
            continue
        curve = next(c for c in curves.curves if c.name == group.name)
        pruned = apply_plan(model, make_plan(structures, scores, {group.name: curve.kept[0]}))
        solve_(pruned, model, readers[0].module, inputs)
        assert curve.losses[0] == pytest.approx(kl(model, pruned, inputs), rel=2e-2, abs=1e-5)
        assert curve.kept[-1] == group.num_units
        assert curve.losses[-1] == 0


class Joined(nn.Module):
    """Two layers that one reads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu())


def test_tied_groups_have_one_curve_with_all_their_readers_repaired() -> None:
    torch.manual_seed(0)
    model, inputs = Joined(), torch.randn(200, 6)
    structures = list_structures(model, inputs, constraints=Constraints(tied=(("left", "right"),), least={"right": 3}))
    batches = [(inputs, torch.zeros(200))]
    moments = observe_activations(model, structures, batches, Observe(positions_per_sample=1000))
    scores = score(model, structures, moments, Random(), seed=1)
    (curve,) = measure_curves(model, structures, scores, moments, batches, Search(num_levels=2)).curves
    assert (curve.name, curve.kept) == ("left", (3, 7, 8))
    pruned = apply_plan(model, make_plan(structures, scores, {"left": 3}))
    solve_(pruned, model, "last", inputs)
    assert curve.losses[0] == pytest.approx(kl(model, pruned, inputs), rel=2e-2)


def solve_(pruned: nn.Module, dense: nn.Module, name: str, inputs: Tensor) -> None:
    """Regress the dense layer's outputs, everywhere, on what the pruned layer reads, by unfolding the whole input."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    layer, original = pruned.get_submodule(name), dense.get_submodule(name)
    handles = [
        m.register_forward_hook(lambda m, args, output: seen.__setitem__(m, (args[0], output)))
        for m in (layer, original)
    ]
    with torch.no_grad():
        dense.eval()(inputs)
        pruned.eval()(inputs)
    for handle in handles:
        handle.remove()
    x, y = seen[layer][0], seen[original][1]
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).movedim(1, -1)
        y = y.flatten(2).movedim(1, -1)
    x, y = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
    prior = layer.weight.detach().flatten(1).T.double()
    fit = CrossMoments.of(x, y).fit(prior, 1e-3, has_intercept=True)
    with torch.no_grad():
        layer.weight.copy_(fit.coefficients.T.reshape(layer.weight.shape))
    layer.register_forward_hook(lambda _m, _i, out: out + as_channels(fit.intercept - bias_of(layer), out, layer))


def bias_of(layer: Any) -> Tensor:
    return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()


def as_channels(values: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
    shape = [1, -1, *[1] * (output.dim() - 2)] if isinstance(layer, nn.Conv2d) else [-1]
    return values.to(output.dtype).reshape(shape)


@pytest.mark.parametrize("name", ["pad_resnet", "encoder", "upsampled"])
def test_the_dense_network_is_restored_even_after_an_error(name: str) -> None:
    model, inputs, structures, scores = prepared(name)
    moments = observe_activations(model, structures, [(inputs, torch.zeros(40))], Observe())
    model.train()
    next(model.children()).eval()
    model.forward = own = model.forward
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    last.forward = patched = last.forward
    flags = [m.training for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    values = {key: value.clone() for key, value in model.state_dict().items()}

    def listen(event: Any) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    batches = [(inputs, torch.zeros(40))]
    first = measure_curves(model, structures, scores, moments, batches, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        measure_curves(model, structures, scores, moments, batches, SETTINGS, notify=listen)
    assert measure_curves(model, structures, scores, moments, batches, SETTINGS) == first
    assert flags == [m.training for m in model.modules()]
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (model.forward, last.forward) == (own, patched)
    assert [m for m in model.modules() if "forward" in vars(m)] == [model, last]


class InPlace(nn.Module):
    """Blocks that begin with a ReLU in place on what the block before gave out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.relu = nn.Conv2d(4, 6, 3, 1, 1), nn.Conv2d(6, 4, 3, 1, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(self.relu(self.conv1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.one, self.two, self.three = self.Block(), self.Block(), self.Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)).neg_())
        return self.fc(self.three(self.relu(x.sub_(0.3))).mean((2, 3)))


def test_in_place_work_between_blocks_is_done_once() -> None:
    torch.manual_seed(0)
    model, inputs = InPlace(), torch.randn(40, 3, 6, 6)
    structures = list_structures(model, inputs)
    scores = score(model, structures, NOTHING, Random())
    curves = measure_curves(model, structures, scores, NOTHING, [(inputs, torch.zeros(40))], SETTINGS)
    assert sum(c.kind == "block" for c in curves.curves) == 3
    for curve, kept, loss in points(curves):
        widths, blocks = ({curve.name: kept}, []) if curve.kind == "channels" else ({}, [curve.name])
        pruned = apply_plan(model, make_plan(structures, scores, widths, blocks))
        assert loss == pytest.approx(max(kl(model, pruned, inputs), 0.0), rel=1e-3, abs=1e-6)


def test_empty_split_and_logits_that_are_not_finite_are_refused() -> None:
    model, inputs, structures, scores = prepared("mlp")
    with pytest.raises(DataError, match="calib"):
        measure_curves(model, structures, scores, NOTHING, [], SETTINGS)
    with pytest.raises(DataError, match="not finite"):
        measure_curves(model, structures, scores, NOTHING, [(inputs / 0, torch.zeros(40))], SETTINGS)


def test_width_levels_are_multiples_below_the_dense_width() -> None:
    assert width_levels(16, 6, 1) == [1, 4, 7, 9, 12, 15]
    assert width_levels(16, 6, 4) == [4, 8, 12]
    assert width_levels(8, 6, 8) == []
    assert len(width_levels(512, 1, 8)) == 1
    assert width_levels(16, 6, 4, least=5) == [8, 12]
    assert width_levels(16, 6, 1, least=16) == []


class Remembering(nn.Module):
    """The second layer leaves a number in an attribute, which another one reads."""

    class Second(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.level = x.mean(1, keepdim=True)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), self.Second(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.second.level = x.new_zeros(len(x), 1)
        x = self.second(self.first(x).relu()).relu()
        return self.last(x) + 5 * self.second.level * x[:, :4]


def test_a_network_whose_layers_read_more_than_their_arguments_runs_as_a_whole() -> None:
    torch.manual_seed(0)
    model, inputs = Remembering(), torch.randn(40, 6)
    structures = list_structures(model, inputs)
    scores = score(model, structures, NOTHING, Random())
    curves = measure_curves(model, structures, scores, NOTHING, [(inputs, torch.zeros(40))], SETTINGS)
    second = [(kept, loss) for curve, kept, loss in points(curves) if curve.name == "second"]
    assert len(second) == 3
    for kept, loss in second:
        pruned = apply_plan(model, make_plan(structures, scores, {"second": kept}, []))
        assert loss == pytest.approx(max(kl(model, pruned, inputs), 0.0), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["pad_resnet", "normalised"])
def test_threads_and_what_is_held_at_once_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, structures, scores = prepared(name, 200)
    batches = [(inputs, torch.zeros(200))]
    moments = observe_activations(model, structures, batches, Observe())
    before = torch.get_num_threads()
    found = []
    for num_threads, held in ((1, 2**28), (3, 2**28), (2, 1)):
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(cut_losses, "_WEIGHT_BYTES", held)
        events: list[Any] = []
        settings = Search(num_levels=2)
        found.append(measure_curves(model, structures, scores, moments, batches, settings, notify=events.append))
        assert torch.get_num_threads() == num_threads
        assert len(events) > 1 and events[-1].done == events[-1].total
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
