"""How much accuracy is lost if one kind of structure is removed from a trained network, before any training?

    python benchmarks/surgery.py vit_cifar10 --out runs/surgery-vit [--shares 0.25 0.5]

Needs the environment variables of the pipeline (CIFAR10_DIR, VIT_WEIGHTS). The kinds are attention heads, hidden units
(channels that one layer writes), the width of the residual stream (channels that several layers write) and whole
layers. Each is removed alone; the table shows the test accuracy after slicing only, and after repair. The pipeline's
scorer scores channels and heads; a layer's score is the KL divergence of the outputs without it. Prints a Markdown
table. A killed run resumes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from judging import Subject
from torch import nn

from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.module_kinds import has_two_sides
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.recipe import LogitDivergence
from deploypipe.records import ChannelGroup, PruningPlan
from deploypipe.runs.store import open_run
from deploypipe.scoring import score
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.user_pipeline import load_pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    units: int  # of this kind in the dense network, all groups together
    params_kept: float
    macs_kept: float
    sliced: float  # accuracy in percent
    repaired: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    options = parser.parse_args()
    surgeon = Surgeon(Subject(load_pipeline(options.pipeline), keep=()))
    dense = surgeon.subject.accuracy(surgeon.subject.dense)
    print(f"\nDense: {dense:.2f} %. Accuracy repaired (sliced only), and what is left of parameters and MACs\n")
    print("| structures | in all | " + " | ".join(f"{100 * s:g} % removed" for s in options.shares) + " |")
    print("|---" * (len(options.shares) + 2) + "|")
    with open_run(options.out) as run:
        for kind, decide in surgeon.kinds().items():
            found = [
                run.remember(
                    f"{kind}-{share}",
                    {"structures": surgeon.subject.structures, "recipe": surgeon.subject.recipe, "share": share},
                    lambda _, d=decide, s=share: surgeon.judge(*d(s)),
                    Outcome,
                ).record
                for share in options.shares
            ]
            cells = [
                f"{o.repaired:.2f} ({o.sliced:.1f}), {100 * o.params_kept:.0f} / {100 * o.macs_kept:.0f} %"
                for o in found
            ]
            print(f"| {kind} | {found[0].units} | " + " | ".join(cells) + " |", flush=True)


class Surgeon:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.modules = dict(subject.dense.named_modules())
        self.batches = subject.drawn(0)
        self.moments: Moments = subject.moments(self.batches, 0)
        self.table = score(subject.dense, subject.structures, self.moments, subject.recipe.score, seed=0)

    def kinds(self) -> dict[str, Callable[[float], tuple[int, PruningPlan]]]:
        groups: dict[str, list[ChannelGroup]] = {"heads": [], "hidden units": [], "width": []}
        for group in self.subject.structures.groups:
            writers = [m for m in group.members if m.side == "out" and has_two_sides(self.modules[m.module])]
            kind = "heads" if group.kind == "heads" else "width" if len(writers) > 1 else "hidden units"
            groups[kind].append(group)
        found = {kind: lambda share, of=of: self.thinned(of, share) for kind, of in groups.items() if of}
        return {**found, "layers": self.without_layers} if self.subject.structures.blocks else found

    def thinned(self, groups: list[ChannelGroup], share: float) -> tuple[int, PruningPlan]:
        widths = {group.name: max(1, round(group.num_units * (1 - share))) for group in groups}
        units = sum(group.num_units for group in groups)
        return units, make_plan(self.subject.structures, self.table, widths)

    def without_layers(self, share: float) -> tuple[int, PruningPlan]:
        settings = LogitDivergence(num_samples=256)
        ranking = rank_blocks(self.subject.dense, self.subject.structures, self.moments, self.batches, settings)
        order = sorted(ranking.importance, key=lambda name: ranking.importance[name])
        removed = order[: max(1, round(len(order) * share))]
        return len(order), make_plan(self.subject.structures, self.table, {}, removed)

    def judge(self, units: int, plan: PruningPlan) -> Outcome:
        subject = self.subject
        pruned: nn.Module = apply_plan(subject.dense, plan)
        mended = subject.repaired(pruned, plan, self.batches, 0)
        params = sum(p.numel() for p in pruned.parameters()) / subject.structures.num_params
        return Outcome(
            units=units,
            params_kept=params,
            macs_kept=subject.macs_kept(pruned),
            sliced=subject.accuracy(pruned),
            repaired=subject.accuracy(mended),
        )


if __name__ == "__main__":
    main()
