"""Does a scorer keep its lead after training? Uniform widths, repaired, then the pipeline's own short fine-tune.

    python benchmarks/finetune.py resnet56_cifar10 --out runs/finetune-resnet56 [--width 0.5] [--epochs 2] [--seeds 3]

Needs the environment variables of the pipeline (CIFAR10_DIR, RESNET56_WEIGHTS). The default scorers are the best three
of `scores.py` and plain magnitude. The seed selects half of the calibration samples, the positions that the repair
sees, and the fine-tune's mixing and dropout. The order of the training images is the pipeline's. The epoch is chosen on
val. Prints a Markdown table of test accuracy. A killed run resumes.
"""

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from judging import ENTRANTS, Subject, stage_name, with_spread

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Finetune
from deploypipe.records import Event, Progress, ScoreTable, TrainLog
from deploypipe.runs.store import RunFolder, open_run
from deploypipe.scoring import score
from deploypipe.task import Batch
from deploypipe.training.finetune import finetune
from deploypipe.user_pipeline import load_pipeline

BEST = ("output error", "MIPP", "layer-wise MI, joint", "magnitude L2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one scorer with one seed."""

    macs_kept: float
    repaired: float  # accuracy in percent
    tuned: float
    log: TrainLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scorers", nargs="+", choices=ENTRANTS, default=list(BEST))
    options = parser.parse_args()
    subject = Subject(load_pipeline(options.pipeline))
    settings = replace(subject.recipe.finetune, num_epochs=options.epochs)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in options.scorers}
    with open_run(options.out) as run:
        for seed in range(options.seeds):
            for name, outcome in judge(run, subject, options.scorers, options.width, settings, seed).items():
                outcomes[name].append(outcome)
    show(outcomes, options.width, options.epochs)


def judge(
    run: RunFolder, subject: Subject, names: list[str], width: float, settings: Finetune, seed: int
) -> dict[str, Outcome]:
    batches = subject.drawn(seed)

    @cache
    def moments() -> Moments:  # only needed if an earlier run has not judged a scorer
        return subject.moments(batches, seed)

    def compute(name: str, work: Path) -> Outcome:
        table = score(subject.dense, subject.structures, moments(), ENTRANTS[name], seed=seed)
        return tune(subject, table, width, batches, settings, seed, work)

    found = {}
    for name in names:
        recipe = replace(subject.recipe, seed=seed, score=ENTRANTS[name], finetune=settings)
        found[name] = run.remember(
            stage_name(name, seed),
            {"recipe": recipe, "width": width, "structures": subject.structures},
            lambda work, n=name: compute(n, work),
            Outcome,
        ).record
        print(f"seed {seed}, {name}: repaired {found[name].repaired:.2f}, tuned {found[name].tuned:.2f}", flush=True)
    return found


def tune(
    subject: Subject, table: ScoreTable, width: float, batches: list[Batch], settings: Finetune, seed: int, work: Path
) -> Outcome:
    def report(event: Event) -> None:
        if isinstance(event, Progress) and event.done % 50 == 0:
            print(f"{event.message}: {event.done}/{event.total}", end="\r", flush=True)

    _, mended = subject.cut(table, width, batches, seed)
    tuned, log = finetune(
        mended, subject.dense, subject.splits, subject.task, settings, checkpoint=work, seed=seed, notify=report
    )
    for file in work.glob("epoch-*"):  # only an interrupted fine-tune needs them
        file.unlink()
    return Outcome(
        macs_kept=subject.macs_kept(mended), repaired=subject.accuracy(mended), tuned=subject.accuracy(tuned), log=log
    )


def show(outcomes: dict[str, list[Outcome]], width: float, num_epochs: int) -> None:
    speedup = 1 / next(iter(outcomes.values()))[0].macs_kept
    print(f"\n{100 * width:g} % widths, 1/{speedup:.2f} MACs: test accuracy, %; mean of the seeds [least, greatest]\n")
    print(f"| scorer | repaired | after {num_epochs} epochs | epochs chosen | s |\n|---|---|---|---|---|")
    for name, seen in sorted(outcomes.items(), key=lambda item: -np.mean([o.tuned for o in item[1]])):
        repaired, tuned = with_spread([o.repaired for o in seen]), with_spread([o.tuned for o in seen])
        chosen = ", ".join(str(o.log.chosen_epoch) for o in seen)
        seconds = np.mean([sum(epoch.seconds for epoch in o.log.epochs) for o in seen])
        print(f"| {name} | {repaired} | {tuned} | {chosen} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
