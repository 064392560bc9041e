"""How much does each step contribute? CIFAR-10 ResNets at 2.1x fewer MACs, or at another --speedup.

    python benchmarks/compression.py resnet56_cifar10 --out runs/bench-resnet56 [--epochs 5] [--speedup 2.1] [--seed 0]
        [--scorer magnitude]

Needs the environment variables of the pipeline (CIFAR10_DIR, RESNET56_WEIGHTS). For one network and one seed it
compares

  * uniform widths with widths allocated by measured KL, sliced only and repaired, without training;
  * the repaired, allocated network with uniform magnitude slicing without repair, both after the same short fine-tune;
  * the latency of both in ONNX Runtime with that of the dense file, timed in turns, and the accuracy of the files.

Accuracy is that on the 10,000 test images. Every choice (scores, widths, epoch) is made on training images. The time of
each stage is reported, too. Prints a Markdown table. A killed run resumes.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from judging import test_hits
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.benchmark import compare_files
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.numerics.intervals import interval_of_mean
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.saved_network import own_weights
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Magnitude, Mipp, Recipe
from deploypipe.records import BenchmarkReport, Event, Progress, PruningPlan, TrainLog
from deploypipe.runs.store import RunFolder, open_run
from deploypipe.scoring import score
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.search.allocation.solver import Allocation, Bound, allocate_to, allowed_widths, uniform
from deploypipe.search.cost_models.additive_costs import mac_costs
from deploypipe.target_files import load_target
from deploypipe.task import Splits, Task, forward, take, take_calib
from deploypipe.training.finetune import finetune
from deploypipe.user_pipeline import load_pipeline

SCORERS = {"mipp": Mipp(), "magnitude": Magnitude()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Accuracy on the test split."""

    percent: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plans:
    plain: PruningPlan  # uniform widths
    allocated: PruningPlan  # by measured KL
    macs_dense: int
    macs_plain: int
    macs_allocated: int
    seconds: dict[str, float]
    observe_ratio: float  # time to observe, divided by that of a plain forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--speedup", type=float, default=2.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scorer", choices=SCORERS, default="magnitude")
    options = parser.parse_args()
    loaded = load_pipeline(options.pipeline)
    recipe = loaded.recipe()
    recipe = replace(
        recipe,
        seed=options.seed,
        score=SCORERS[options.scorer],
        finetune=replace(recipe.finetune, num_epochs=options.epochs),
    )
    with open_run(options.out) as run:
        Comparison(
            run, loaded.build_model().eval(), loaded.load_data(), loaded.task(), recipe, options.speedup
        ).print_()


class Comparison:
    def __init__(
        self, run: RunFolder, dense: nn.Module, splits: Splits, task: Task, recipe: Recipe, speedup: float
    ) -> None:
        self.run, self.dense, self.splits, self.task = run, dense, splits, task
        self.recipe, self.speedup = recipe, speedup
        self.calib = take_calib(splits.calib, 2048)
        self.inputs = take(self.calib[0][0], 2)
        self.key = {"recipe": recipe, "speedup": speedup}

    def print_(self) -> None:
        plans = self.run.remember("plans", self.key, lambda _: self.plans(), Plans).record
        rows = [("dense", 1.0, self.accuracy("dense", lambda: self.dense))]
        for name, plan, macs in (
            ("plain", plans.plain, plans.macs_plain),
            ("allocated", plans.allocated, plans.macs_allocated),
        ):
            speedup = plans.macs_dense / macs
            label = "uniform widths" if name == "plain" else "widths by measured KL"
            sliced = self.accuracy(f"{name}-sliced", lambda p=plan: apply_plan(self.dense, p))
            rows.append((f"{label}, sliced only", speedup, sliced))
            rows.append(
                (f"{label}, repaired", speedup, self.accuracy(f"{name}-repaired", lambda p=plan: self.mended(p)))
            )
        logs = []
        for name, plan, start, label in (
            (
                "ours",
                plans.allocated,
                lambda: self.mended(plans.allocated),
                "widths by measured KL, repaired, fine-tuned",
            ),
            ("slicing", plans.plain, lambda: apply_plan(self.dense, plans.plain), "uniform, sliced, same fine-tune"),
        ):
            tuned = self.run.remember(f"{name}-tune", self.key, lambda w, s=start: self.tuned(w, s()), TrainLog)
            report = self.run.remember(
                f"{name}-bench", self.key, lambda w, f=tuned.files, p=plan: self.bench(w, f, p), BenchmarkReport
            )
            logs.append((label, tuned.record, report.record))
        self._show(plans, rows, logs)

    def plans(self) -> Plans:
        seconds: dict[str, float] = {}

        def timed(name: str, work: Callable[[], object]) -> object:
            started = time.perf_counter()
            result = work()
            seconds[name] = time.perf_counter() - started
            return result

        structures = list_structures(self.dense, self.inputs, self.recipe.keep, self.recipe.constraints)
        samples = take_calib(self.calib, self.recipe.observe.num_samples)
        timed("warm-up", lambda: [self._plain(b) for b, _ in samples[:1]])
        timed("plain forward", lambda: [self._plain(b) for b, _ in samples])
        moments: Moments = timed(
            "observe", lambda: observe_activations(self.dense, structures, samples, self.recipe.observe)
        )  # type: ignore[assignment]
        scores = timed("score", lambda: score(self.dense, structures, moments, self.recipe.score))
        curves = timed(
            "curves",
            lambda: measure_curves(self.dense, structures, scores, moments, self.calib, self.recipe.search),  # type: ignore[arg-type]
        )

        def plan_of(allocation: Allocation) -> PruningPlan:
            return make_plan(structures, scores, allocation.widths, allocation.blocks)  # type: ignore[arg-type]

        def macs_of(allocation: Allocation) -> int:
            return count_macs(apply_plan(self.dense, plan_of(allocation)), self.inputs)[1]

        bound = Bound(costs=mac_costs(structures, allowed_widths(structures, curves)), share=1 / self.speedup)  # type: ignore[arg-type]
        allocated = timed(
            "allocate",
            lambda: allocate_to(structures, curves, [bound], lambda a: [macs_of(a) / structures.num_macs]),  # type: ignore[arg-type]
        )
        shares = [share / 400 for share in range(400, 0, -1)]
        plain = next(
            u for u in (uniform(structures, s, 1) for s in shares) if macs_of(u) * self.speedup <= structures.num_macs
        )
        return Plans(
            plain=plan_of(plain),
            allocated=plan_of(allocated),  # type: ignore[arg-type]
            macs_dense=structures.num_macs,
            macs_plain=macs_of(plain),
            macs_allocated=macs_of(allocated),  # type: ignore[arg-type]
            seconds=seconds,
            observe_ratio=seconds["observe"] / seconds["plain forward"],
        )

    def _plain(self, batch: object) -> None:
        with torch.no_grad():
            forward(self.dense, batch)

    def mended(self, plan: PruningPlan) -> nn.Module:
        pruned = apply_plan(self.dense, plan)
        return repair(self.dense, pruned, plan, self.calib, self.recipe.repair, seed=self.recipe.seed)[0]

    def accuracy(self, stage: str, model: Callable[[], nn.Module]) -> Accuracy:
        def compute(_: Path) -> Accuracy:
            hits = test_hits(model(), self.splits, self.task)
            seen = interval_of_mean(hits)
            return Accuracy(percent=seen.value * 100, low=seen.low * 100, high=seen.high * 100, count=len(hits))

        return self.run.remember(stage, self.key, compute, Accuracy).record

    def tuned(self, work: Path, start: nn.Module) -> TrainLog:
        def show(event: Event) -> None:
            if isinstance(event, Progress) and event.done % 50 == 0:
                print(f"\r{event.message}: {event.done}/{event.total}", end="", flush=True)

        settings, seed = self.recipe.finetune, self.recipe.seed
        tuned, log = finetune(
            start, self.dense, self.splits, self.task, settings, checkpoint=work, seed=seed, notify=show
        )
        save_file(own_weights(tuned), work / "weights.safetensors")
        for file in work.glob("epoch-*"):
            file.unlink()
        return log

    def bench(self, work: Path, weights: Path, plan: PruningPlan) -> BenchmarkReport:
        tuned = apply_plan(self.dense, plan)
        tuned.load_state_dict(load_file(weights / "weights.safetensors"))
        batches = take_calib(self.calib, 64)
        dense_file = export_onnx(self.dense, batches, work / "dense.onnx", self.recipe.export)
        file = export_onnx(tuned, batches, work / "compressed.onnx", self.recipe.export)
        return compare_files(
            dense_file, file, folder=work, test_batches=self.splits.test, task=self.task,
            target=load_target("x86_cpu"),
            counts=(count_macs(self.dense, self.inputs), count_macs(tuned, self.inputs)),
        )  # fmt: skip

    def _show(
        self,
        plans: Plans,
        rows: list[tuple[str, float, Accuracy]],
        logs: list[tuple[str, TrainLog, BenchmarkReport]],
    ) -> None:
        print("\n\n| network | MACs | test accuracy, % (95 %) | latency, dense = 1 (95 %) |\n|---|---|---|---|")
        for label, speedup, seen in rows:
            print(f"| {label} | 1/{speedup:.2f} | {seen.percent:.2f} ({seen.low:.2f} to {seen.high:.2f}) | |")
        for label, log, report in logs:
            speedup = report.dense.num_macs / report.compressed.num_macs
            measured, ratio = report.compressed.accuracy, report.latency_ratio
            assert measured is not None and ratio is not None
            accuracy = f"{measured.value * 100:.2f} ({measured.low * 100:.2f} to {measured.high * 100:.2f})"
            latency = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            print(f"| {label} ({log.chosen_epoch} epochs) | 1/{speedup:.2f} | {accuracy} | {latency} |")
        for label, log, report in logs:
            by_epoch = [round(epoch.val_accuracy * 100, 2) for epoch in log.epochs]
            seconds = sum(epoch.seconds for epoch in log.epochs)
            print(f"\n{label}: val by epoch {by_epoch}, {seconds:.0f} s; steady timing: {report.is_steady}")
        print(f"\nobserve / plain forward over the same samples: {plans.observe_ratio:.2f}x")
        print("seconds:", {name: round(value, 1) for name, value in plans.seconds.items()})
        print("by stage:", {t.stage: round(t.seconds, 1) for t in self.run.times})


if __name__ == "__main__":
    main()
