"""Which way to choose widths and blocks gives the most accurate network at the same measured latency?

    python benchmarks/search.py resnet20_cifar10 --out runs/search-resnet20 [--budgets 0.5] [--trials 12] [--epochs 2]

Needs the environment variables of the pipeline (CIFAR10_DIR, RESNET20_WEIGHTS). Run it with OMP_NUM_THREADS=1. Files
are fp32 on ONNX Runtime's CPU provider, one thread; widths are multiples of the target's. All entrants get the dense
network, calibration samples, val, the same latency limit (`deploypipe`'s own: 3 % below the budget) and, if the table
says so, the same least-squares repair:

  * ours: `deploypipe.search` as in a run: scores, loss curves, networks timed for a latency model, study;
  * uniform widths: our scores, the same share of every group, bisected to the measured latency;
  * Torch-Pruning: magnitude, all layers ranked together, in 20 steps (its own pruner), ratio bisected to the latency;
  * Optuna alone: TPE over one share for each group and a switch for each block, our scores and repair, latency as a
    constraint; as many trials as ours, the first third of them random;
  * random search: the same space, as many trials;
  * FastNAS of NVIDIA's Model Optimizer at the multiply-accumulates of our result, with the same step of channels. It
    judges every width of every group on the first part of val, which is more networks than the trials of the others.
    It is left out if `nvidia-modelopt` (with torchprofile 0.0.4) cannot be imported. 0.47 ran on torch 2.13, no GPU.

A bisection takes seven timings with widths in steps of 1 and seven in the target's steps. Of the two networks found,
the more accurate one on val counts. Every network is judged on val after repair. The test split, and the timing of all
final files in turns with the dense one, come last and choose nothing. Minutes are those of the entrant's search, and of
the scores or curves that it uses. Prints a Markdown table for each budget. Compare figures within one table only: while
other work ran on the machine, one file took 0.46 of the dense latency, and minutes later 0.48. A killed run resumes
after the last finished entrant.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import torch
from judging import test_hits
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from rivals import NotExpressedError, fastnas, require_same_shapes, torch_pruning_plan
from torch import nn

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.benchmark.latency import time_interleaved
from deploypipe.errors import BudgetError
from deploypipe.numerics.intervals import interval_of_drop_pp, interval_of_mean, interval_of_median_ratio
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.records import Event, Interval, PrecisionRow, Progress, PruningPlan, Trial
from deploypipe.runs.store import open_run
from deploypipe.runtimes import find_runtime
from deploypipe.search.allocation.limits import search_limits, violations, with_margin
from deploypipe.search.allocation.solver import uniform
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.early_stopping import draw_parts
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.search.evaluation.run_trial import History, evaluate_plan, is_same_network, most_accurate
from deploypipe.search.sample_results import Results, decode_results, encode_results
from deploypipe.search.search_inputs import SearchInputs
from deploypipe.stages import profile, search
from deploypipe.stages.context import RunContext, prepare_run
from deploypipe.target import Budget
from deploypipe.target_files import load_target
from deploypipe.task import channels_last, take, take_calib
from deploypipe.training.finetune import finetune
from deploypipe.user_pipeline import load_pipeline

NUM_BISECTIONS = 7
NUM_LATENCY_SAMPLES = 200  # of a candidate, as `Evaluator` takes them


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One candidate of an entrant."""

    ratio: float  # measured latency, dense = 1
    accuracy: float | None  # on val, or on a part of it; None if it was only timed
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of an entrant."""

    plan: PruningPlan | None  # None: there is no network, and `note` says why
    tried: tuple[Tried, ...]
    seconds: float
    note: str = ""
    shipped_hits: str = ""  # on the test split, of the rival's own network if our plan does not give it


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    packed: str  # sample by sample, on the test split


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratios:
    by_entrant: dict[str, Interval]  # latency, dense = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    label: str
    entrant: str
    is_repaired: bool = True

    @property
    def stage(self) -> str:
        return f"{self.entrant}-{'repaired' if self.is_repaired else 'sliced'}"


ROWS = (
    Row(label="ours", entrant="ours"),
    Row(label="uniform widths, repaired", entrant="uniform"),
    Row(label="Torch-Pruning, as it ships", entrant="torch_pruning", is_repaired=False),
    Row(label="Torch-Pruning, our repair", entrant="torch_pruning"),
    Row(label="Optuna TPE alone, repaired", entrant="tpe"),
    Row(label="random search, repaired", entrant="random"),
    Row(label="FastNAS, as it ships", entrant="fastnas", is_repaired=False),
    Row(label="FastNAS widths, our channels and repair", entrant="fastnas"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pipeline = load_pipeline(options.pipeline)
    recipe = pipeline.recipe()
    recipe = replace(
        recipe,
        search=replace(recipe.search, num_trials=options.trials),
        finetune=replace(recipe.finetune, num_epochs=options.epochs),
    )
    target = replace(
        load_target("x86_cpu"), batch_size=options.batch, precisions=("fp32",), runtime="onnxruntime", num_threads=1
    )
    model, splits, task = with_slim_attention(pipeline.build_model()), pipeline.load_data(), pipeline.task()
    # A cache of its own: latencies are cached by shape, and those of an earlier run, when the machine was slower or
    # faster, would favour the first entrant.
    os.environ["DEPLOYPIPE_CACHE"] = str(options.out.absolute() / "cache")
    with open_run(options.out, _tell) as run:
        for budget in options.budgets:
            limited = replace(target, budget=Budget(latency_p50=f"{budget}x"))
            afresh = replace(
                run, finished=[], times=[]
            )  # numbers its stages from 1, so it finds those of other budgets
            ctx = prepare_run(model, splits, task, recipe, limited, afresh, source=pipeline.source)
            Contest(pipeline.name, ctx).print_()


def _tell(event: Event) -> None:
    if not isinstance(event, Progress) or event.stage == "search":
        print(f"{time.strftime('%H:%M:%S')} {event}", flush=True)


class Contest:
    """All entrants at one budget."""

    def __init__(self, name: str, ctx: RunContext) -> None:
        self.name, self.ctx, self.run, self.recipe, self.target = name, ctx, ctx.run, ctx.recipe, ctx.target
        self.dense, self.splits, self.task = ctx.model, ctx.splits, ctx.task
        self.structures = profile.structures(ctx).record
        baseline = profile.baseline(ctx, profile.dense_export(ctx))
        self.observed = profile.observe(ctx, self.structures)
        self.scored = profile.score(ctx, self.structures, self.observed)
        self.scores = self.scored.record
        self.limits, _ = search_limits(self.target.budget.limits(), ctx.ability)
        self.most = with_margin(self.limits)["latency_p50"].value  # of the dense network's latency
        row = PrecisionRow(precision="fp32", file=baseline.record.file)
        self.goal = search.goal(ctx, self.structures, baseline, self.limits, row)
        self.candidates, self.reference = self.goal.candidates, self.goal.reference
        # The key holds everything that entrants get: another network, budget or device is another contest. Training
        # comes after the choice, so its settings are left out.
        untrained = replace(self.recipe, finetune=replace(self.recipe.finetune, num_epochs=0))
        self.key = {**ctx.origin, "device": ctx.device, "recipe": untrained, "budget": self.target.budget}

    def print_(self) -> None:
        entrants: dict[str, Callable[[], Found]] = {
            "uniform": self.uniform,
            "torch_pruning": self.torch_pruning,
            "tpe": lambda: self.drawn(
                optuna.samplers.TPESampler(seed=self.recipe.seed, n_startup_trials=self.recipe.search.num_trials // 3)
            ),
            "random": lambda: self.drawn(optuna.samplers.RandomSampler(seed=self.recipe.seed)),
        }
        found = {"ours": self.ours()}
        for name, entrant in entrants.items():
            found[name] = self.run.remember(name, self.key, _ignoring_folder(entrant), Found).record
        found["fastnas"] = self.fastnas_at(found["ours"].plan)
        Table(self, found).print_()

    def ours(self) -> Found:
        started = time.perf_counter()
        try:
            latency = search.timed_networks(self.ctx, self.goal)
            feasibility = search.feasibility(self.ctx, self.goal, latency).record
            curves = profile.loss_curves(self.ctx, self.structures, self.scored, self.observed)
            inputs = SearchInputs(
                goal=self.goal, latency=latency, feasibility=feasibility, scores=self.scores, curves=curves
            )
            result = search.confirm(self.ctx, inputs, search.search(self.ctx, inputs))
        except BudgetError as error:
            return Found(plan=None, tried=(), seconds=time.perf_counter() - started, note=str(error))
        if result.latency_fit:
            off = [p / m - 1 for p, m in zip(result.latency_fit.predicted, result.latency_fit.measured, strict=True)]
            print(f"latency model, each network held out: {min(off):+.1%} to {max(off):+.1%}", flush=True)
        return Found(
            plan=result.trials[result.best].plan,
            tried=tuple(map(self._tried, result.trials)),
            seconds=self.seconds("latency", "feasibility", "curves", "search", "confirm"),
        )

    def uniform(self) -> Found:
        def plan_of(share: float, multiple: int) -> PruningPlan:
            widths = uniform(self.structures, share, multiple).widths
            return make_plan(self.structures, self.scores, widths, (), multiple)

        return self._bisected(plan_of)

    def torch_pruning(self) -> Found:
        inputs = take(self.ctx.calib[0][0], 2)

        def plan_of(share: float, multiple: int) -> PruningPlan:
            round_to = multiple if multiple > 1 else None
            return torch_pruning_plan(self.dense, inputs, self.structures, 1 - share, round_to)

        return self._bisected(plan_of)

    def drawn(self, sampler: optuna.samplers.BaseSampler) -> Found:
        """Let Optuna choose every share and every block itself."""
        started = time.perf_counter()
        study = optuna.create_study(direction="maximize", sampler=sampler)
        excess_of = partial(violations, dense=self.reference, limits=with_margin(self.limits))
        history = History(trials=[], results={})
        space = self._space()
        with self._evaluator() as evaluator:
            while len(history.trials) < self.recipe.search.num_trials:
                asked = study.ask(space)
                knobs = {name: float(value) for name, value in asked.params.items()}
                number, plan = len(history.trials), self._plan_of_knobs(knobs, history.trials)
                twin = next((t for t in history.trials if is_same_network(t.plan, plan)), None)
                if twin:
                    trial, results = replace(twin, number=number, knobs=knobs), None
                else:
                    trial, results = evaluate_plan(number, knobs, plan, evaluator, excess_of, ("accuracy",), history)
                asked.set_constraint("latency", trial.violations["latency_p50"])
                study.tell(asked, trial.candidate.accuracy)
                history.trials.append(trial)
                history.results |= {number: results} if results is not None else {}
        fitting = [t for t in history.trials if t.feasible and not t.is_stopped]
        return Found(
            plan=most_accurate(fitting).plan if fitting else None,
            tried=tuple(map(self._tried, history.trials)),
            seconds=time.perf_counter() - started,
            note="" if fitting else "no trial met the latency",
        )

    def fastnas_at(self, ours: PruningPlan | None) -> Found:
        """Run FastNAS. If it is not installed, this is not stored, so that a later call can include it."""
        if ours is None:
            return Found(plan=None, tried=(), seconds=0.0, note="we have no result whose MACs it could be given")
        try:
            return self.run.remember("fastnas", {**self.key, "ours": ours}, lambda _: self._fastnas(ours), Found).record
        except (ImportError, NotExpressedError) as error:
            return Found(plan=None, tried=(), seconds=0.0, note=f"{type(error).__name__}: {error}")

    def _fastnas(self, ours: PruningPlan) -> Found:
        started = time.perf_counter()
        look, tried = draw_parts(self.splits.val, self.recipe.seed, channels_last)[0], 0

        def accuracy(network: nn.Module) -> float:
            nonlocal tried
            tried += 1
            return float(evaluate_module(network, look, self.task).mean())

        inputs = take(self.ctx.calib[0][0], 1)
        macs = count_macs(apply_plan(self.dense, ours), inputs)[1]
        calib = take_calib(self.ctx.calib, self.recipe.observe.num_samples)
        network, widths = fastnas(
            self.dense, inputs, self.structures, macs, self.target.channel_multiple, calib, accuracy
        )
        plan = make_plan(self.structures, self.scores, widths)
        require_same_shapes(network, apply_plan(self.dense, plan))
        seconds = time.perf_counter() - started
        ratio = self._ratio(plan)
        return Found(
            plan=plan,
            tried=(Tried(ratio=ratio, accuracy=None, fits=ratio <= self.most),),
            seconds=seconds,
            note=f"its own network, {macs:,} MACs asked; it judged {tried} networks to choose one",
            shipped_hits=encode_results(test_hits(network, self.splits, self.task)),
        )

    def seconds(self, *stages: str) -> float:
        return sum(t.seconds for t in self.run.times if t.stage in stages)

    def repaired(self, plan: PruningPlan) -> nn.Module:
        pruned, settings, tokens = apply_plan(self.dense, plan), self.recipe.repair, self.task.real_tokens
        calib, seed = self.ctx.calib, self.recipe.seed
        return repair(self.dense, pruned, plan, calib, settings, real_tokens=tokens, seed=seed)[0]

    def network(self, row: Row, plan: PruningPlan) -> nn.Module:
        return self.repaired(plan) if row.is_repaired else apply_plan(self.dense, plan)

    def timed_files(self, plans: Mapping[str, PruningPlan]) -> Ratios:
        """Time the files of all entrants and the dense one in turns."""
        with TemporaryDirectory() as folder:
            files = [self._write(plan, Path(folder) / f"{name}.onnx") for name, plan in plans.items()]
            runtime, opened = find_runtime(self.target), self.candidates.dense_opened
            with runtime.open(opened, num_threads=1) as session:
                inputs = first_batch(self.ctx.calib, session.input_names, self.target.batch_size)
            timings = time_interleaved([opened, *files], inputs, runtime, self.target)
        dense, *others = timings.samples
        ratios = [interval_of_median_ratio(samples, dense, block=timings.block) for samples in others]
        return Ratios(by_entrant=dict(zip(plans, ratios, strict=True)))

    def tuned(self, work: Path, start: nn.Module) -> Hits:
        settings, seed = self.recipe.finetune, self.recipe.seed
        network, log = finetune(
            start,
            self.dense,
            self.splits,
            self.task,
            settings,
            checkpoint=work,
            teacher_outputs=self.run.path / "teacher-outputs",
            seed=seed,
        )
        for file in work.glob("epoch-*"):  # only an interrupted fine-tune needs them
            file.unlink()
        print(f"val by epoch: {[round(100 * epoch.val_accuracy, 2) for epoch in log.epochs]}", flush=True)
        return self.hits(network)

    def hits(self, network: nn.Module) -> Hits:
        return Hits(packed=encode_results(test_hits(network, self.splits, self.task)))

    def _bisected(self, plan_of: Callable[..., PruningPlan]) -> Found:
        """Find the widest network within the latency with both steps; return the more accurate one on val."""
        started = time.perf_counter()
        tried: list[Tried] = []
        judged: list[tuple[float, PruningPlan]] = []
        with self._evaluator() as evaluator:
            for multiple in (1, self.target.channel_multiple):
                plan, timed = self._widest(partial(plan_of, multiple=multiple))
                tried += timed
                if plan:
                    accuracy = evaluator(plan, lambda *_: False)[0].accuracy
                    judged.append((accuracy, plan))
                    tried.append(Tried(ratio=self._ratio(plan), accuracy=accuracy, fits=True))
        best = max(judged, key=lambda pair: pair[0])[1] if judged else None
        seconds = time.perf_counter() - started
        return Found(plan=best, tried=tuple(tried), seconds=seconds, note="" if best else "no width met the latency")

    def _widest(self, plan_of: Callable[[float], PruningPlan]) -> tuple[PruningPlan | None, list[Tried]]:
        best, tried, low, high = None, list[Tried](), 0.0, 1.0
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            plan = plan_of(middle)
            ratio = self._ratio(plan)
            fits = ratio <= self.most
            tried.append(Tried(ratio=ratio, accuracy=None, fits=fits))
            best, low, high = (plan, middle, high) if fits else (best, low, middle)
        return best, tried

    def _ratio(self, plan: PruningPlan) -> float:
        with TemporaryDirectory() as folder:
            file = self._write(plan, Path(folder) / "candidate.onnx")
            return self.candidates.latency_ratios([file], NUM_LATENCY_SAMPLES)[0]

    def _write(self, plan: PruningPlan, path: Path) -> Path:
        return self.candidates.write(apply_plan(self.dense, plan), plan, path)

    @contextmanager
    def _evaluator(self) -> Iterator[Evaluator]:
        with TemporaryDirectory() as folder:
            yield Evaluator(
                candidates=self.candidates,
                dense_p50_ms=self.reference.latency_p50_ms,
                calib=self.ctx.calib,
                parts=draw_parts(self.splits.val, self.recipe.seed, channels_last),
                task=self.task,
                recipe=self.recipe,
                needs_peak_memory=False,
                work=Path(folder),
                accuracies=AccuracyCache(Path(folder)),
            )

    def _space(self) -> dict[str, BaseDistribution]:
        """The search space: for each group from the least to the dense width, for each block whether it goes."""
        groups, multiple = self.structures.groups, self.target.channel_multiple
        least = {g.name: self.structures.least_width(g, multiple) / g.num_units for g in groups}
        shares = {name: FloatDistribution(share, 1.0) for name, share in least.items()}
        blocks = {block.name: CategoricalDistribution((0, 1)) for block in self.structures.blocks}
        return {**shares, **blocks}

    def _plan_of_knobs(self, knobs: Mapping[str, float], _: Sequence[Trial]) -> PruningPlan:
        widths = {g.name: max(1, round(knobs[g.name] * g.num_units)) for g in self.structures.groups}
        blocks = [block.name for block in self.structures.blocks if knobs[block.name]]
        return make_plan(self.structures, self.scores, widths, blocks, self.target.channel_multiple)

    def _tried(self, trial: Trial) -> Tried:
        latency, dense = trial.candidate.latency_p50_ms, self.reference.latency_p50_ms
        assert latency is not None and dense is not None
        return Tried(ratio=latency / dense, accuracy=trial.candidate.accuracy, fits=trial.feasible)


class Table:
    """The results of a contest: accuracy on the test split, and latency."""

    def __init__(self, contest: Contest, found: Mapping[str, Found]) -> None:
        self.contest, self.found, self.run = contest, found, contest.run
        plans = {name: entrant.plan for name, entrant in found.items() if entrant.plan}
        self.plans, key = plans, {**contest.key, "plans": plans}
        self.ratios = self.run.remember("timed", key, lambda _: contest.timed_files(plans), Ratios).record.by_entrant
        self.num_epochs = contest.recipe.finetune.num_epochs

    def print_(self) -> None:
        contest, seen = self.contest, [row for row in ROWS if row.entrant in self.plans]
        hits = {row: self._hits(row) for row in seen}
        tuned = {row: self._tuned(row) for row in seen if self.num_epochs and self._is_rebuilt(row)}
        dense = self._remembered("dense-test", None, lambda _: contest.hits(contest.dense))
        print(f"\n{contest.name}, latency at most {contest.target.budget.latency_p50}, ", end="")
        print(f"batch {contest.target.batch_size}; dense network: {_percent(dense)} on test\n")
        epochs = "one epoch" if self.num_epochs == 1 else f"{self.num_epochs} epochs"
        print(
            "| entrant | latency, dense = 1 (95 %) | MACs | test accuracy, % (95 %) | behind ours, pp (95 %) "
            f"| after {epochs}, % (95 %) | then behind ours, pp (95 %) | met the latency | minutes |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for row in ROWS:
            if row not in hits:
                print(f"| {row.label} | none: {self.found[row.entrant].note} | | | | | | | |")
                continue
            cells = [self._latency(row), self._macs(row), _percent(hits[row]), _behind(hits, row)]
            cells += [_percent(tuned[row]), _behind(tuned, row)] if row in tuned else ["", ""]
            print(f"| {row.label} | {' | '.join(cells)} | {self._met(row)} | {self._minutes(row):.1f} |")
        self._print_tried()

    def _hits(self, row: Row) -> Results:
        """The metric of every sample of the test split."""
        entrant = self.found[row.entrant]
        if not self._is_rebuilt(row):
            return decode_results(entrant.shipped_hits)
        contest, plan = self.contest, self.plans[row.entrant]
        return self._remembered(row.stage, plan, lambda _: contest.hits(contest.network(row, plan)))

    def _tuned(self, row: Row) -> Results:
        contest, plan = self.contest, self.plans[row.entrant]
        return self._remembered(
            f"{row.stage}-tuned",
            plan,
            lambda work: contest.tuned(work, contest.network(row, plan)),
            finetune=contest.recipe.finetune,
        )

    def _remembered(
        self, stage: str, plan: PruningPlan | None, compute: Callable[[Path], Hits], **inputs: object
    ) -> Results:
        return decode_results(
            self.run.remember(stage, {**self.contest.key, "plan": plan, **inputs}, compute, Hits).record.packed
        )

    def _is_rebuilt(self, row: Row) -> bool:
        """Whether the row's network follows from its plan and the dense network."""
        return row.is_repaired or not self.found[row.entrant].shipped_hits

    def _latency(self, row: Row) -> str:
        ratio = self.ratios[row.entrant]
        return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"

    def _macs(self, row: Row) -> str:
        contest = self.contest
        pruned = apply_plan(contest.dense, self.plans[row.entrant])
        return f"{count_macs(pruned, contest.ctx.inputs)[1] / contest.structures.num_macs:.2f}"

    def _met(self, row: Row) -> str:
        tried = self.found[row.entrant].tried
        return f"{sum(t.fits for t in tried)} of {len(tried)}"

    def _minutes(self, row: Row) -> float:
        needs_scores = row.is_repaired and row.entrant != "torch_pruning"
        prepared = self.contest.seconds("observe", "score") if needs_scores else 0.0
        return (self.found[row.entrant].seconds + prepared) / 60

    def _print_tried(self) -> None:
        for name, entrant in self.found.items():
            tried = [f"{t.ratio:.3f}{'' if t.fits else ' (over)'}{_on_val(t.accuracy)}" for t in entrant.tried]
            print(f"\n{name}: {', '.join(tried)}{'; ' if tried else ''}{entrant.note}")
        for name, plan in self.plans.items():
            widths = [cut.num_units - len(cut.removed) for cut in plan.cuts]
            print(f"\n{name}: widths {widths} of {[c.group for c in plan.cuts]}, without {list(plan.blocks)}")


def _ignoring_folder(search: Callable[[], Found]) -> Callable[[Path], Found]:
    return lambda _: search()


def _percent(hits: Results) -> str:
    seen = interval_of_mean(hits)
    return f"{100 * seen.value:.2f} ({100 * seen.low:.2f} to {100 * seen.high:.2f})"


def _behind(hits: Mapping[Row, Results], row: Row) -> str:
    ours = hits.get(ROWS[0])
    if ours is None or row == ROWS[0]:
        return ""
    drop = interval_of_drop_pp(ours, hits[row])
    return f"{drop.value:.2f} ({drop.low:.2f} to {drop.high:.2f})"


def _on_val(accuracy: float | None) -> str:
    return "" if accuracy is None else f" {100 * accuracy:.2f} %"


if __name__ == "__main__":
    main()
