"""How well does closed-form MIPP agree with the paper's own form, which trains a network for every unit?

    python benchmarks/predictive.py resnet20_cifar10 [--layers layer1.0.conv2 ...] [--samples 512]

For every layer, prints Spearman's rank correlation between the two orders in which input units are removed, and the
seconds. For comparison, it prints the correlation between two runs of the paper's form with different seeds: no other
method can agree better.
"""

import argparse
import time
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
from deploypipe.observe.calibration_pass import hooked
from deploypipe.observe.layer_regressions import columns, num_taps, sample_inputs, sample_positions, weight_matrix
from deploypipe.recipe import Mipp
from deploypipe.scoring.mutual_information.mipp_trained_network import score_mipp_predictive
from deploypipe.scoring.top_down_ranking import cumulative, remove_greedily
from deploypipe.task import Batch, forward, take_calib
from deploypipe.user_pipeline import load_pipeline

DEFAULT_LAYERS = ("layer1.0.conv2", "layer1.2.conv2", "layer2.1.conv2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--layers", nargs="+", default=DEFAULT_LAYERS)
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    loaded = load_pipeline(options.pipeline)
    model = loaded.build_model().eval()
    batches = take_calib(loaded.load_data().calib, options.samples)
    print(
        "| layer | units | closed form against the paper's | the paper's against itself | s | s |\n" + "|---" * 6 + "|"
    )
    for name in options.layers:
        layer: Any = model.get_submodule(name)
        x = read_rows(model, name, batches)
        y = x @ weight_matrix(layer).detach().T
        units = [columns([unit], num_taps(layer)) for unit in range(layer.weight.shape[1])]
        started = time.perf_counter()
        covariance, weights = torch.cov(x.T.double(), correction=0), weight_matrix(layer).detach().double().T
        problem = SequentialRemoval(covariance, weights, units, noise=Mipp().noise)
        closed = cumulative(*remove_greedily([problem], len(units)))
        middle = time.perf_counter()
        first, second = (score_mipp_predictive(x, y, units, seed=seed)[0] for seed in (0, 1))
        seconds = (time.perf_counter() - middle) / 2
        agreement, itself = spearmanr(closed, first).statistic, spearmanr(first, second).statistic
        cells = f"{agreement:.2f} | {itself:.2f} | {middle - started:.2f} | {seconds:.0f}"
        print(f"| {name} | {len(units)} | {cells} |", flush=True)


def read_rows(model: nn.Module, name: str, batches: list[Batch]) -> Tensor:
    """The layer's inputs at four positions of each sample: (rows, inputs * taps)."""
    generator, rows = torch.Generator().manual_seed(0), []

    def read(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        rows.append(sample_inputs(module, args[0], output, sample_positions(module, output, 4, generator)))

    with hooked(model, [(name, read)]), torch.no_grad():
        for inputs, _ in batches:
            forward(model, inputs)
    return torch.cat(rows)


if __name__ == "__main__":
    main()
