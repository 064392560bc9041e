"""Moments equal numpy's, and the observed network is unchanged."""

from copy import deepcopy
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.observe.calibration_pass import observe_activations, observe_halves
from deploypipe.observe.collectors import MAX_ROWS
from deploypipe.observe.layer_regressions import within_groups
from deploypipe.observe.pass_statistics import load_moments, merge, save_moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Observe
from deploypipe.records import Structures
from deploypipe.task import Batch

EVERYWHERE = Observe(num_samples=1000, positions_per_sample=10_000)


def prepared(name: str, num_batches: int = 3) -> tuple[nn.Module, Structures, list[Batch]]:
    model, inputs = networks.build(name)
    make = networks.NETWORKS[name][1]
    return model, list_structures(model, inputs), [(make(), torch.zeros(4)) for _ in range(num_batches)]


@pytest.mark.parametrize("name, reader", [("pad_resnet", "stages.1.0.conv2"), ("resnext", "layer2.0.conv2")])
def test_moments_equal_numpy_if_all_positions_are_taken(name: str, reader: str) -> None:
    model, structures, batches = prepared(name)
    batches = [(inputs + 50, target) for inputs, target in batches]  # a mean far above the deviation
    moments = observe_activations(model, structures, batches, EVERYWHERE)
    read: dict[str, list[Tensor]] = {name: [] for name in moments.inputs}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: read[name].append(args[0]))
        for name in read
    ]
    model.eval()
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    for handle in handles:
        handle.remove()
    assert reader in read
    for name, seen in moments.inputs.items():
        layer, x = model.get_submodule(name), torch.cat(read[name])
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).movedim(1, -1)
        rows = x.reshape(-1, len(seen.mean)).double().numpy()
        assert seen.num_rows == len(rows)
        scale = np.abs(rows).max()
        np.testing.assert_allclose(seen.mean.numpy() / scale, rows.mean(0) / scale, atol=1e-6)
        np.testing.assert_allclose(
            seen.covariance.numpy() / scale**2,
            within_groups(layer, torch.from_numpy(np.cov(rows.T, bias=True))).reshape(seen.covariance.shape) / scale**2,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_the_network_is_unchanged(name: str) -> None:
    model, structures, batches = prepared(name)
    model.train()
    next(model.children()).eval()
    flags = [m.training for m in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    moments = observe_activations(model, structures, batches, Observe(num_samples=10))
    assert moments.num_samples == 10
    assert moments.block_cka.shape == (len(structures.blocks),) * 2
    assert all(torch.isfinite(seen.covariance).all() for seen in moments.inputs.values())
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_moments_depend_only_on_the_seed() -> None:
    model, structures, batches = prepared("pad_resnet")
    first, again, other = (observe_activations(model, structures, batches, Observe(), seed=s) for s in (0, 0, 1))
    for name, seen in first.inputs.items():
        assert torch.equal(seen.covariance, again.inputs[name].covariance)
    assert not torch.equal(first.inputs["stages.0.0.conv2"].mean, other.inputs["stages.0.0.conv2"].mean)


def test_drawn_positions_do_not_depend_on_the_size_of_batches() -> None:
    model, structures, batches = prepared("pad_resnet")
    joined = [(torch.cat([inputs for inputs, _ in batches]), torch.cat([target for _, target in batches]))]
    first, second = (observe_activations(model, structures, each, Observe()) for each in (batches, joined))
    for name, seen in first.inputs.items():
        torch.testing.assert_close(seen.covariance, second.inputs[name].covariance, rtol=1e-4, atol=1e-6)


def test_nan_names_the_layer_and_hooks_are_removed() -> None:
    model, structures, batches = prepared("flattened")
    with torch.no_grad():
        model.conv1.bias[0] = float("nan")
    model.train()
    with pytest.raises(DataError, match="conv2"):
        observe_activations(model, structures, batches, Observe())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_removed_when_the_network_raises() -> None:
    model, structures, _ = prepared("flattened")
    with pytest.raises(RuntimeError):
        observe_activations(model, structures, [(torch.randn(4, 5, 8, 8), torch.zeros(4))], Observe())
    assert not any(m._forward_hooks for m in model.modules())


def test_empty_split_is_refused() -> None:
    model, structures, _ = prepared("mlp")
    with pytest.raises(DataError, match="calib"):
        observe_activations(model, structures, [], Observe())


@pytest.mark.parametrize("name", ["pad_resnet", "mlp"])  # with and without blocks
def test_saved_and_loaded_are_the_same(name: str, tmp_path: Path) -> None:
    model, structures, batches = prepared(name)
    moments = observe_activations(model, structures, batches, Observe())
    save_moments(moments, tmp_path / "moments.safetensors")
    loaded = load_moments(tmp_path / "moments.safetensors")
    assert loaded.skipped == moments.skipped
    assert loaded.block_names == moments.block_names
    assert loaded.num_samples == moments.num_samples
    assert torch.equal(loaded.block_cka, moments.block_cka)
    assert loaded.inputs.keys() == moments.inputs.keys()
    for key, seen in moments.inputs.items():
        assert torch.equal(loaded.inputs[key].mean, seen.mean)
        assert torch.equal(loaded.inputs[key].covariance, seen.covariance)
        assert loaded.inputs[key].num_rows == seen.num_rows


def test_in_place_changes_after_a_block_do_not_change_its_similarity() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    class Net(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 3, 1, 1), Block(), Block()
            self.relu, self.fc = nn.ReLU(inplace=inplace), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.relu(self.two(self.relu(self.one(self.stem(x))))).mean((2, 3)))

    batches = [(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8))]
    seen = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = Net(inplace)
        seen.append(observe_activations(model, list_structures(model, batches[0][0]), batches, Observe()))
    assert seen[0].block_names == ("one", "two")
    assert torch.equal(seen[0].block_cka, seen[1].block_cka)


def with_labels(batches: list[Batch], classes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(inputs, torch.randint(classes, (len(inputs),), generator=generator)) for inputs, _ in batches]


def test_merged_halves_equal_one_pass() -> None:
    model, structures, batches = prepared("pad_resnet", num_batches=5)
    batches = with_labels(batches, 10)
    loss = F.cross_entropy
    whole = observe_activations(model, structures, batches[::2] + batches[1::2], EVERYWHERE, loss=loss)
    odd, even = observe_halves(model, structures, batches, EVERYWHERE, loss=loss)
    merged = merge(odd, even)
    assert (odd.num_samples, even.num_samples, merged.num_samples) == (12, 8, 20)
    for name, seen in whole.inputs.items():
        assert merged.inputs[name].num_rows == seen.num_rows
        torch.testing.assert_close(merged.inputs[name].mean, seen.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.inputs[name].covariance, seen.covariance, rtol=1e-4, atol=1e-5)
    for kind in ("units", "gates", "output_fisher"):
        for name, value in getattr(whole, kind).items():
            torch.testing.assert_close(getattr(merged, kind)[name], value, rtol=1e-4, atol=1e-8)
    assert whole.labels is not None
    assert merged.labels is not None
    assert torch.equal(merged.labels, whole.labels)
    torch.testing.assert_close(merged.block_hsic, whole.block_hsic, rtol=1e-4, atol=1e-5)


def test_a_single_batch_is_split_and_a_single_sample_is_an_error() -> None:
    model, structures, batches = prepared("mlp", num_batches=1)
    odd, even = observe_halves(model, structures, batches, EVERYWHERE)
    assert (odd.num_samples, even.num_samples) == (2, 2)
    with pytest.raises(DataError, match="at least two"):
        observe_halves(model, structures, [(batches[0][0][:1], batches[0][1][:1])], EVERYWHERE)


def test_gates_are_derivatives_of_a_factor_on_each_unit() -> None:
    """A factor in front of the reader, differentiated by hand, sample by sample."""
    model, structures, batches = prepared("flattened", num_batches=2)
    batches = with_labels(batches, 3)
    gates = observe_activations(model, structures, batches, EVERYWHERE, loss=F.cross_entropy).gates
    group = next(g for g in structures.groups if any(m.module == "conv2" and m.side == "in" for m in g.members))
    reader = model.get_submodule("conv2")
    total = torch.zeros(group.num_units, dtype=torch.float64)
    for inputs, target in batches:
        for sample, label in zip(inputs, target, strict=True):
            gate = torch.ones(group.num_units, requires_grad=True)
            handle = reader.register_forward_pre_hook(lambda _m, a, gate=gate: (a[0] * gate[:, None, None],))
            model.eval()
            F.cross_entropy(model(sample[None]), label[None]).backward()
            handle.remove()
            assert gate.grad is not None
            total += gate.grad.double().square()
    torch.testing.assert_close(gates[group.name], total / sum(len(t) for _, t in batches), rtol=1e-4, atol=1e-10)


def test_gradients_and_flags_are_restored() -> None:
    model, structures, batches = prepared("pad_resnet")
    frozen = next(model.parameters()).requires_grad_(False)
    kept = list(model.parameters())[-1]
    kept.grad = torch.ones_like(kept)
    observe_activations(model, structures, with_labels(batches, 10), EVERYWHERE, loss=F.cross_entropy)
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.requires_grad for p in list(model.parameters())[1:])


def test_rows_are_kept_up_to_a_bound() -> None:
    model, structures, _ = prepared("pad_resnet")
    batches = [(torch.randn(600, 3, 8, 8), torch.zeros(600, dtype=torch.long)) for _ in range(2)]
    moments = observe_activations(model, structures, batches, Observe(num_samples=1200))
    assert moments.labels is not None
    assert len(moments.labels) == MAX_ROWS
    assert {len(rows) for rows in [*moments.units.values(), *moments.block_outputs.values()]} == {MAX_ROWS}
    assert moments.num_samples == 1200


class Padded(nn.Module):
    """Embedded tokens (number 0 is padding), a hidden layer and a block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.up(x)))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(20, 6), self.Block(), self.Block()
        self.fc = nn.Linear(6, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        real = (ids != 0).unsqueeze(2) if attention_mask is None else attention_mask.unsqueeze(2)
        return self.fc(self.two(self.one(self.embed(ids))).masked_fill(~real, 0).sum(1) / real.sum(1))


def padded() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    lengths = torch.randint(2, 9, (40, 1))
    return Padded(), torch.randint(1, 20, (40, 8)).masked_fill(torch.arange(8) >= lengths, 0)


@pytest.mark.parametrize("count", [3, 100])
def test_padding_is_ignored(count: int) -> None:
    """Moments do not depend on padding values, and texts of one length have the moments of unpadded texts."""
    model, ids = padded()
    structures = list_structures(model, ids)
    other = deepcopy(model)
    with torch.no_grad():
        other.embed.weight[0] = 100.0
    settings = Observe(positions_per_sample=count)
    masks = {"attention_mask": ids != 0}
    seen = [
        observe_activations(model, structures, [(ids, torch.zeros(40))], settings, real_tokens=lambda x: x != 0),
        observe_activations(other, structures, [(ids, torch.zeros(40))], settings, real_tokens=lambda x: x != 0),
        observe_activations(other, structures, [({"ids": ids, **masks}, torch.zeros(40))], settings),
    ]
    short = ids[(ids != 0).sum(1) == 5]
    alone = observe_activations(model, structures, [(short[:, :5], torch.zeros(len(short)))], EVERYWHERE)
    cut = observe_activations(
        other, structures, [(short, torch.zeros(len(short)))], EVERYWHERE, real_tokens=lambda x: x != 0
    )
    for first, second in ((seen[0], seen[1]), (seen[0], seen[2]), (alone, cut)):
        for name, moments in first.inputs.items():
            torch.testing.assert_close(moments.covariance, second.inputs[name].covariance)
            torch.testing.assert_close(moments.mean, second.inputs[name].mean)
        for name, rows in first.units.items():
            torch.testing.assert_close(rows, second.units[name])
        torch.testing.assert_close(first.block_hsic, second.block_hsic, rtol=1e-5, atol=0)
    for name, rows in seen[0].block_outputs.items():
        torch.testing.assert_close(rows, seen[1].block_outputs[name])


def test_mask_of_another_shape_is_refused() -> None:
    model, ids = padded()
    with pytest.raises(DataError, match="real_tokens"):
        observe_activations(
            model, list_structures(model, ids), [(ids, torch.zeros(40))], Observe(), real_tokens=lambda x: x[:5]
        )


def test_moments_between_two_groups_are_zero() -> None:
    model, structures, batches = prepared("resnext")
    moments = observe_activations(model, structures, batches, EVERYWHERE, shuffled=True)
    grouped = [name for name in moments.inputs if getattr(model.get_submodule(name), "groups", 1) == 2]
    assert grouped
    for name in grouped:
        half = len(moments.inputs[name].mean) // 2
        assert not moments.inputs[name].covariance[:half, half:].any()
        assert moments.inputs[name].covariance[:half, :half].any()
        assert not moments.shuffled[name][:half, moments.shuffled[name].shape[1] // 2 :].any()
