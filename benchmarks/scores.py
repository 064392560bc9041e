"""Which scorer is best? Try all of them on one trained network, at several uniform widths, without training.

    python benchmarks/scores.py resnet20_cifar10 --out runs/scores-resnet20 [--widths 0.75 0.5 0.4] [--draws 3]

Needs the environment variables of the pipeline (CIFAR10_DIR, RESNET20_WEIGHTS). For every draw of calibration samples,
every scorer and every width, it takes the test accuracy of the network after slicing only, and after repair. A draw is
a random half of the calibration split; scores and repair see the same samples. Prints a Markdown table of means over
the draws, with minimum and maximum. A killed run resumes.
"""

import argparse
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from judging import ENTRANTS, Subject, stage_name, with_spread

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Scorer
from deploypipe.runs.store import RunFolder, open_run
from deploypipe.scoring import score
from deploypipe.task import Batch
from deploypipe.user_pipeline import load_pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one scorer on one draw."""

    seconds: float  # of scoring, without the calibration pass
    macs_kept: dict[str, float]  # by width
    sliced: dict[str, float]  # accuracy in percent
    repaired: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.75, 0.5, 0.4])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scorers", nargs="+", choices=ENTRANTS, default=list(ENTRANTS))
    options = parser.parse_args()
    with open_run(options.out) as run:
        comparison = Comparison(run, Subject(load_pipeline(options.pipeline)), options.widths)
        outcomes = {name: [] for name in options.scorers}
        for draw in range(options.draws):
            for name, outcome in comparison.outcomes(draw, options.scorers).items():
                outcomes[name].append(outcome)
    show(outcomes, options.widths)


class Comparison:
    def __init__(self, run: RunFolder, subject: Subject, widths: list[float]) -> None:
        self.run, self.subject, self.widths = run, subject, widths

    def outcomes(self, draw: int, names: list[str]) -> dict[str, Outcome]:
        batches = self.subject.drawn(draw)

        @cache
        def moments() -> Moments:  # only needed if an earlier run has not judged a scorer
            return self.subject.moments(batches, draw)

        found = {}
        for name in names:
            found[name] = self.run.remember(
                stage_name(name, draw),
                {
                    "scorer": ENTRANTS[name],
                    "draw": draw,
                    "widths": self.widths,
                    "structures": self.subject.structures,
                },
                lambda _, n=name: self.judge(ENTRANTS[n], moments(), batches, draw),
                Outcome,
            ).record
            print(f"draw {draw}, {name}: repaired {found[name].repaired}", flush=True)
        return found

    def judge(self, scorer: Scorer, moments: Moments, batches: list[Batch], draw: int) -> Outcome:
        subject = self.subject
        started = time.perf_counter()
        table = score(subject.dense, subject.structures, moments, scorer, seed=draw)
        seconds = time.perf_counter() - started
        macs, sliced, repaired = {}, {}, {}
        for width in self.widths:
            pruned, mended = subject.cut(table, width, batches, draw)
            macs[str(width)] = subject.macs_kept(pruned)
            sliced[str(width)], repaired[str(width)] = subject.accuracy(pruned), subject.accuracy(mended)
        return Outcome(seconds=seconds, macs_kept=macs, sliced=sliced, repaired=repaired)


def show(outcomes: dict[str, list[Outcome]], widths: list[float]) -> None:
    first = next(iter(outcomes.values()))[0]
    heads = [f"{100 * w:g} % widths, 1/{1 / first.macs_kept[str(w)]:.2f} MACs" for w in widths]
    print("\nAccuracy repaired (sliced only), %; mean of the draws, and their least and greatest\n")
    print("| scorer | " + " | ".join(heads) + " | s |\n" + "|---" * (len(widths) + 2) + "|")
    last = str(widths[-1])
    for name, seen in sorted(outcomes.items(), key=lambda item: -np.mean([o.repaired[last] for o in item[1]])):
        cells = []
        for width in map(str, widths):
            repaired, sliced = with_spread([o.repaired[width] for o in seen]), [o.sliced[width] for o in seen]
            cells.append(f"{repaired} ({np.mean(sliced):.1f})")
        print(f"| {name} | " + " | ".join(cells) + f" | {np.mean([o.seconds for o in seen]):.1f} |")


if __name__ == "__main__":
    main()
