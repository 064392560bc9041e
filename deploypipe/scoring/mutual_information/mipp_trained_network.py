"""MIPP as the paper runs it, with a small trained network instead of a closed form (arXiv:2411.00147 v1).

A slow reference for tests and benchmarks: one training per unit. We fix what the paper leaves open: the network's size,
its steps, the noise, and that networks with and without the unit are tuned alike and compared on held-out samples.

Legend: n samples; X (n, p) what a layer reads; Y (n, m) what it writes; R repeats, each with its own split and network.
    networks    R small networks trained together, as a list of weights with a leading axis R
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t
from torch import Tensor

_HIDDEN = 32
_TRAIN_STEPS = 400
_TUNE_STEPS = 100
_LEARNING_RATE = 0.01
_HELD_OUT = 0.3  # share of the samples
# Added to the standardised Y: a layer is deterministic, so errors of an imperfect tuning would count as information.
_NOISE = 0.1

_Networks = list[Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Splits:
    """R splits of the same samples."""

    x: Tensor  # (R, training samples, p)
    y: Tensor
    held_x: Tensor  # (R, held-out samples, p)
    held_y: Tensor


def score_mipp_predictive(
    rows_x: Tensor,
    rows_y: Tensor,
    unit_columns: Sequence[Sequence[int]],
    *,
    confidence: float = 0.95,
    repeats: int = 5,
    seed: int = 0,
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """A score for every unit (higher = keep), and the units that stay.

    Removed units are numbered in order of removal. Those that stay lie above them by the share of Y's variance that is
    lost with them. unit_columns[i]: the columns of X that are unit i. Units are visited from the least to the most
    informative. A unit stays if the held-out squared error is greater without it, with more than `confidence`. This is
    a one-sided paired t-test over the repeats; their training sets overlap, so it is slightly overconfident. The last
    unit always stays.
    """
    generator = torch.Generator().manual_seed(seed)
    y = _standardised(rows_y)
    y = y + _NOISE * torch.randn(y.shape, generator=generator)
    splits = _split(_standardised(rows_x), y, repeats, seed)
    columns = torch.zeros(len(unit_columns), rows_x.shape[1])
    for unit, own in enumerate(unit_columns):
        columns[unit, list(own)] = 1
    order = _single_unit_losses(splits, columns, generator).argsort(descending=True, stable=True).tolist()
    networks = _trained(_new_networks(splits, repeats, generator), splits.x, splits.y, _TRAIN_STEPS)
    scores, kept = [0.0] * len(order), set(order)
    losses: dict[int, float] = {}
    mask = torch.ones(rows_x.shape[1])
    for unit in order:
        without = mask * (1 - columns[unit])
        with_unit, without_unit, increase = _compare(networks, splits, mask, without)
        if _confidence(increase) > confidence or len(kept) == 1:
            networks, losses[unit] = with_unit, max(0.0, float(increase.mean()))
        else:
            networks, mask = without_unit, without
            scores[unit] = float(len(order) - len(kept))
            kept.remove(unit)
    for unit, loss in losses.items():
        scores[unit] = len(order) - len(kept) + loss
    return tuple(scores), tuple(sorted(kept))


def _compare(
    networks: _Networks, splits: _Splits, mask: Tensor, without: Tensor
) -> tuple[_Networks, _Networks, Tensor]:
    """`networks` tuned with and without a unit, and by how much the held-out loss of each is greater without, (R,)."""
    repeats = len(splits.x)
    masks = torch.stack([mask, without]).repeat_interleave(repeats, dim=0).unsqueeze(1)  # (2 R, 1, p)
    twice = [torch.cat([weight, weight]) for weight in networks]
    tuned = _trained(twice, splits.x.repeat(2, 1, 1) * masks, splits.y.repeat(2, 1, 1), _TUNE_STEPS)
    losses = _losses(tuned, splits.held_x.repeat(2, 1, 1) * masks, splits.held_y.repeat(2, 1, 1))
    increase = losses[repeats:] - losses[:repeats]
    return [weight[:repeats] for weight in tuned], [weight[repeats:] for weight in tuned], increase


def _confidence(increase: Tensor) -> float:
    """Confidence that the mean of `increase` (R,) is above zero; 0.5 if nothing changes."""
    error = float(increase.std()) / len(increase) ** 0.5
    return float(t.cdf(float(increase.mean()) / max(error, 1e-12), df=len(increase) - 1))


def _single_unit_losses(splits: _Splits, columns: Tensor, generator: torch.Generator) -> Tensor:
    """Held-out loss (units,) of networks that read one unit each, on the first split."""
    count = len(columns)
    masks = columns.unsqueeze(1)
    networks = _new_networks(splits, count, generator)
    y = splits.y[:1].expand(count, -1, -1)
    networks = _trained(networks, splits.x[:1] * masks, y, _TRAIN_STEPS)
    return _losses(networks, splits.held_x[:1] * masks, splits.held_y[:1].expand(count, -1, -1))


def _new_networks(splits: _Splits, count: int, generator: torch.Generator) -> _Networks:
    """`count` networks p -> hidden -> m with ReLU, He initialisation."""
    p, m = splits.x.shape[2], splits.y.shape[2]
    first = torch.randn(count, p, _HIDDEN, generator=generator) * (2 / p) ** 0.5
    second = torch.randn(count, _HIDDEN, m, generator=generator) * (1 / _HIDDEN) ** 0.5
    return [first, torch.zeros(count, 1, _HIDDEN), second, torch.zeros(count, 1, m)]


def _losses(networks: _Networks, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each network on its own samples, in units of Y's variance."""
    first, first_bias, second, second_bias = networks
    outputs = torch.relu(x @ first + first_bias) @ second + second_bias
    return (outputs - y).square().mean((1, 2))


def _trained(networks: _Networks, x: Tensor, y: Tensor, steps: int) -> _Networks:
    """The networks after `steps` full-batch steps of Adam; the sum of the losses trains each by itself."""
    weights = [weight.clone().requires_grad_() for weight in networks]
    optimizer = torch.optim.Adam(weights, lr=_LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        _losses(weights, x, y).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [weight.detach() for weight in weights]


def _split(x: Tensor, y: Tensor, repeats: int, seed: int) -> _Splits:
    held = round(_HELD_OUT * len(x))
    orders = [torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + r)) for r in range(repeats)]
    rows = torch.stack(orders)
    return _Splits(x=x[rows[:, held:]], y=y[rows[:, held:]], held_x=x[rows[:, :held]], held_y=y[rows[:, :held]])


def _standardised(rows: Tensor) -> Tensor:
    """Zero mean and unit variance by column; constants become zero."""
    rows = rows.float()
    spread = rows.std(0)
    is_constant = spread <= 1e-6 * rows.abs().amax(0)  # float32 rounding of a constant would count as variance
    return ((rows - rows.mean(0)) / spread.masked_fill(is_constant, 1)).masked_fill(is_constant, 0)
