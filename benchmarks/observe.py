"""What the streaming observation costs, as a multiple of a plain forward pass over the same samples.

    python benchmarks/observe.py resnet56_cifar10 [--rounds 9]

Both run in turns in one process over the recipe's calibration samples; prints seconds and the ratio of the medians.
"""

import argparse
import time

import numpy as np
import torch

from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.observe.stream import observe
from deploypipe.pipeline_module import load_pipeline
from deploypipe.pruning.structures import list_structures
from deploypipe.task import forward, num_samples, take, take_calib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    loaded = load_pipeline(options.pipeline)
    model, settings = loaded.build_model().eval(), loaded.recipe().observe
    batches = take_calib(loaded.load_data().calib, settings.num_samples)
    structures = list_structures(model, take(batches[0][0], 2))

    def plain() -> None:
        with torch.no_grad():
            for inputs, _ in batches:
                forward(model, inputs)

    def observed() -> None:
        observe(model, structures, batches, settings)

    seconds: dict[str, list[float]] = {"plain": [], "observe": []}
    for number in range(options.rounds + 1):
        for name, work in (("plain", plain), ("observe", observed)):
            started = time.perf_counter()
            work()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratio = interval_of_median_ratio(np.array(seconds["observe"]), np.array(seconds["plain"]))
    count = sum(num_samples(inputs) for inputs, _ in batches)
    print(f"{count} samples; plain {np.median(seconds['plain']):.2f} s, observe {np.median(seconds['observe']):.2f} s")
    print(f"ratio {ratio.value:.2f} (95 %: {ratio.low:.2f} to {ratio.high:.2f})")


if __name__ == "__main__":
    main()
