"""Predict the latency of any choice of widths and blocks, from a few dozen whole networks timed on the target.

A network's time is a sum over its layers. A layer's time is a function of its two widths and of its kind. No formula
gives that function, with its steps, for all devices, so it is modelled as a Gaussian process over both widths. A sum of
Gaussian processes is one too, so the times of whole networks suffice to learn it. No runtime has to report the times of
single layers, and what it fuses or reorders is included in the measured times.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from deploypipe.records import Cut, Interval, TimedCut
from deploypipe.search.cost_models.width_dependencies import LayerWidths

Floats = NDArray[np.float64]
Widths = tuple[int, int]  # inputs, outputs of a layer
Key = tuple[str, ...]  # a function of widths, and the kind of layers it is taken over

_STEPS = (4, 8, 16, 32)  # channels that vector units and tile sizes come in
_Z95 = 1.96
_LOG_BOUNDS = (-14.0, 2.0)  # of a prior's variance
_LOG_NOISE_BOUNDS = (-14.0, -3.0)
_START, _START_NOISE = -4.0, -7.0
_JITTER = 1e-9
_SLACK = 0.1  # a narrower network may be slower: times are noisy, and some devices are slow at odd widths


class LatencyModel:
    """A latency model fitted to networks that were timed next to the dense one.

    All times are shares of the dense fp32 file's. dense: the time of the dense network in the precision of the others.

    A sum of layers that was fitted to noisy times may be negative, or above the time of a wider network. So the timed
    networks bound every prediction. None is faster than the fastest of them. Apart from `_SLACK`, none is faster than a
    network that it contains layer by layer, or slower than one that contains it.

    Costs O(n^3 + n^2 features) for n networks. The same measurements give the same model.
    """

    def __init__(self, layers: Sequence[LayerWidths], timed: Sequence[TimedCut], dense: float = 1.0) -> None:
        self.layers, self.timed, self.dense = tuple(layers), tuple(timed), dense
        self._features = _Features(self.layers)
        cuts = (Cut(removed={}, blocks=()), *(t.cut for t in timed))
        self._widths = np.stack([self._widths_of(cut) for cut in cuts])
        rows = [self._features.of(cut) for cut in cuts]
        self._columns = {key: i for i, key in enumerate(dict.fromkeys(key for row in rows for key in row))}
        self._design = np.stack([self._row(row) for row in rows])
        self._times = np.array([dense, *(t.ratio for t in timed)])
        owners = np.array([_KINDS.index(key[0]) for key in self._columns])
        self._variances, self._noise = _fit_prior(self._design, self._times, owners)
        self._prior = self._variances[owners]
        covariance = (self._design * self._prior) @ self._design.T + self._noise * np.diag(self._times**2)
        self._factor = cho_factor(covariance + _JITTER * np.eye(len(rows)), lower=True)
        self._weights = self._prior * (self._design.T @ cho_solve(self._factor, self._times))

    def predict(self, cut: Cut) -> Interval:
        """Predict the latency of a network, with a 95 % interval for one measurement of it."""
        features = self._features.of(cut)
        row = self._row(features)
        value = float(row @ self._weights)
        reach = self._design @ (self._prior * row)
        variance = float(row @ (self._prior * row) - reach @ cho_solve(self._factor, reach))
        unknown = [(_KINDS.index(key[0]), x) for key, x in features.items() if key not in self._columns]
        variance += sum(float(self._variances[kind]) * x * x for kind, x in unknown)
        spread = _Z95 * float(np.sqrt(max(variance, 0.0) + self._noise * value**2))
        least, most = self._bounds(self._widths_of(cut), np.ones(len(self._times), dtype=bool))
        value = min(max(value, least), most)
        low, high = max(value - spread, (1 - _SLACK) * least), min(value + spread, (1 + _SLACK) * most)
        return Interval(value=value, low=low, high=high)

    @property
    def least(self) -> float:
        """The time of the fastest network that was measured."""
        return float(self._times.min())

    def time_of(self, layer: LayerWidths, widths: Widths) -> float:
        """The share of a network's latency that one layer takes at these widths."""
        return float(self._row(self._features.of_layer(layer, widths)) @ self._weights)

    @property
    def fixed(self) -> float:
        """The share of the latency that no choice changes."""
        return float(self._weights[self._columns[_FIXED]])

    def held_out(self) -> Floats:
        """(n,) predictions of the timed networks, each from all others (Rasmussen and Williams 2006, eq. 5.12)."""
        inverse = cho_solve(self._factor, np.eye(len(self._times)))
        left_out: Floats = self._times - (inverse @ self._times) / np.diag(inverse)
        for number, widths in enumerate(self._widths):
            least, most = self._bounds(widths, np.arange(len(self._times)) != number)
            left_out[number] = min(max(left_out[number], least), most)
        return left_out[1:]

    def _widths_of(self, cut: Cut) -> Floats:
        """(2 layers,): inputs and outputs of each layer; 0 if it is removed with its block."""
        gone = set(cut.blocks)
        stays = [gone.isdisjoint(layer.blocks) for layer in self.layers]
        widths = [[side.width(cut.removed) for side in (layer.inputs, layer.outputs)] for layer in self.layers]
        left: Floats = np.array(widths, dtype=np.float64) * np.array(stays)[:, None]
        return left.ravel()

    def _bounds(self, widths: Floats, known: NDArray[np.bool_]) -> tuple[float, float]:
        """Bounds (low, high) of a network's time, from the timed networks that `known` selects."""
        times, others = self._times[known], self._widths[known]
        inside, around = (others <= widths).all(axis=1), (others >= widths).all(axis=1)
        least = max(float(times.min()), (1 - _SLACK) * float(times[inside].max(initial=0.0)))
        most = (1 + _SLACK) * float(times[around].min(initial=np.inf))
        return min(least, most), max(least, most)  # measurements may contradict each other

    def _row(self, features: Mapping[Key, float]) -> Floats:
        """(columns,) of the design matrix. Pairs of widths that no timed network has are not among them."""
        row = np.zeros(len(self._columns))
        for key, x in features.items():
            if key in self._columns:
                row[self._columns[key]] = x
        return row


_FIXED = ("fixed",)
_PLAIN = ("count", "inputs", "outputs", "product")
_STEPPED = tuple(f"{side} in {step}s" for step in _STEPS for side in ("inputs", "outputs", "both"))
_KINDS = ("fixed", *(f"all {name}" for name in _PLAIN), *_PLAIN, *_STEPPED, "pair")


class _Features:
    """The features that a network's latency is linear in.

    For each kind of layer: functions of the two widths, as shares of the dense network's; the same functions over
    layers of all kinds; and one feature for each pair of widths that occurs.
    """

    def __init__(self, layers: Sequence[LayerWidths]) -> None:
        self.layers = layers
        work: dict[str, float] = {}
        for layer in layers:
            work[layer.kind] = work.get(layer.kind, 0.0) + layer.macs
        total = sum(work.values()) or 1.0
        count = len(work)
        self.share = {kind: 0.5 * macs / total + 0.5 / count for kind, macs in work.items()}
        self.dense: dict[tuple[str, str], float] = {}
        for layer in layers:
            for name, value in _functions(layer.inputs.dense, layer.outputs.dense).items():
                self.dense[layer.kind, name] = self.dense.get((layer.kind, name), 0.0) + value
        self.numbers = {kind: sum(layer.kind == kind for layer in layers) for kind in work}

    def of(self, cut: Cut) -> dict[Key, float]:
        total: dict[Key, float] = {_FIXED: 1.0}
        for layer in self.layers:
            if not set(layer.blocks).isdisjoint(cut.blocks):
                continue
            for key, x in self.of_layer(
                layer, (layer.inputs.width(cut.removed), layer.outputs.width(cut.removed))
            ).items():
                total[key] = total.get(key, 0.0) + x
        return total

    def of_layer(self, layer: LayerWidths, widths: Widths) -> dict[Key, float]:
        kind, share = layer.kind, self.share[layer.kind]
        found: dict[Key, float] = {}
        for name, value in _functions(*widths).items():
            x = share * value / self.dense[kind, name]
            found[name, kind] = x
            if name in _PLAIN:
                found[(f"all {name}",)] = x
        found["pair", kind, str(widths)] = share / self.numbers[kind]
        return found


def _functions(inputs: int, outputs: int) -> dict[str, float]:
    found = {"count": 1.0, "inputs": inputs, "outputs": outputs, "product": inputs * outputs}
    for step in _STEPS:
        wide_in, wide_out = -(-inputs // step) * step, -(-outputs // step) * step
        found[f"inputs in {step}s"] = wide_in * outputs
        found[f"outputs in {step}s"] = inputs * wide_out
        found[f"both in {step}s"] = wide_in * wide_out
    return {name: float(value) for name, value in found.items()}


def _fit_prior(design: Floats, times: Floats, owners: NDArray[np.int64]) -> tuple[Floats, float]:
    """Maximise the marginal likelihood (Rasmussen and Williams 2006, eq. 5.8 and 5.9).

    owners: each column's kind. Returns the prior variance of a weight by kind of column, and the noise's variance
    relative to a time.
    """
    parts = [design[:, owners == kind] @ design[:, owners == kind].T for kind in range(len(_KINDS))]
    squares = np.diag(times**2)

    def negative(log_variances: Floats) -> tuple[float, Floats]:
        variances = np.exp(log_variances)
        covariance = sum(v * part for v, part in zip(variances, parts, strict=False)) + variances[-1] * squares
        factor = cho_factor(covariance + _JITTER * np.eye(len(times)), lower=True)
        solved = cho_solve(factor, times)
        inverse = cho_solve(factor, np.eye(len(times)))
        value = 0.5 * float(times @ solved) + float(np.log(np.diag(factor[0])).sum())
        inner = inverse - np.outer(solved, solved)
        slopes = [0.5 * v * float((inner * part).sum()) for v, part in zip(variances, [*parts, squares], strict=True)]
        return value, np.array(slopes)

    start = np.array([_START] * len(parts) + [_START_NOISE])
    bounds = [_LOG_BOUNDS] * len(parts) + [_LOG_NOISE_BOUNDS]
    found = minimize(negative, start, jac=True, bounds=bounds, method="L-BFGS-B")
    best = np.exp(found.x)
    return best[:-1], float(best[-1])
