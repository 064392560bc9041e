"""The command line; the only module that prints. Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted."""

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deploypipe.errors import ConfigError, DeploypipeError
from deploypipe.jsonio import load_toml, override, to_json
from deploypipe.records import Event, GateDecision, Verdict
from deploypipe.report.tables import (
    PRECISION_HEADER,
    before_after,
    check_cells,
    plan_differences,
    plan_rows,
    precision_rows,
    score_notes,
    score_table,
    seconds,
)
from deploypipe.runs import RunResult, load_plan, load_result, write_atomically
from deploypipe.target import Target

if TYPE_CHECKING:
    from deploypipe.benchmark.results import BenchResult

EXIT_HOLD, EXIT_DIFFERENT, EXIT_ERROR, EXIT_INTERRUPTED = 1, 1, 2, 130
STAGES = (
    "structures",
    "baseline",
    "observe",
    "score",
    "curves",
    "search",
    "prune",
    "finetune",
    "export",
    "precision",
    "engine",
    "benchmark",
    "golden",
    "gate",
)
_QUIET_SECONDS = 10.0  # between two lines about the same stage, where there is no live list
COLOURS = {"PASS": "green", "FAIL": "red", "UNKNOWN": "yellow", "ok": "green", "missing": "red", "limited": "yellow"}

app = typer.Typer(
    name="deploypipe",
    help="Compress a trained PyTorch network for one device, measure it there, and decide: SHIP or HOLD.",
    epilog="Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted. Begin with: deploypipe run digits x86_cpu",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plans = typer.Typer(help="Look at pruning plans: what goes, and how two of them differ.", no_args_is_help=True)
app.add_typer(plans, name="plan")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
_PLAN_HELP = "A plan.json, or the folder of a finished run."
PipelineArgument = Annotated[str, typer.Argument(metavar="PIPELINE", help="A file, or the name of one in pipelines/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one field: search.num_trials=4 (recipe), target.budget.latency_p50=0.5x (target), "
        "pipeline.WEIGHTS=w.safetensors (constant of the pipeline module). May be repeated.",
    ),
]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command(epilog="Example: deploypipe run digits x86_cpu --set search.num_trials=4 --set target.num_threads=2")
def run(
    pipeline: PipelineArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A TOML file, or the name of one in targets/.")],
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PIPELINE-TARGET.")] = None,
    set_: SetOption = None,
) -> None:
    """Compress PIPELINE's network for TARGET.

    A run that was interrupted continues where it stopped, with the same command. Ends with SHIP (exit 0) or HOLD (1).
    """
    with _exit_codes():
        settings = _split_settings(set_ or [])
        device = override(load_target(target), settings["target"], "--set target")
        from deploypipe.pipeline import compress  # late: brings torch, which `--help` need not wait for
        from deploypipe.pipeline_module import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        folder = out or Path("runs") / f"{loaded.name}-{device.name}"
        task = loaded.task()
        with _shown_stages() as notify, loaded.blame("the run"):
            result = compress(
                loaded.build_model(),
                loaded.load_data(),
                task,
                recipe,
                device,
                folder,
                source=loaded.source,
                name=loaded.name,
                notify=notify,
            )
        _show_result(result, folder)
    _exit_by(result.decision)


@app.command(epilog="Example: deploypipe score digits --set score.kind=output_error")
def score(
    pipeline: PipelineArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: runs/PIPELINE-scores.html.")] = None,
    set_: SetOption = None,
) -> None:
    """Show how much of PIPELINE's network is redundant, layer by layer, and which of its blocks do alike.

    Takes one pass over the calibration samples; nothing is removed. The scorer is the recipe's. To try another: --set
    score.kind=KIND with magnitude, mipp, layerwise_mi, output_error, conditional_mi, label_mi, taylor, fpgm,
    batch_norm_scale or random.
    """
    with _exit_codes():
        settings = _split_settings(set_ or [], targets=False)
        from deploypipe.pipeline import summarise_scores
        from deploypipe.pipeline_module import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        with _shown_stages() as notify, loaded.blame("the scoring"):
            summary = summarise_scores(loaded.build_model(), loaded.load_data(), loaded.task(), recipe, notify=notify)
        _show_table(f"Redundant units in {loaded.name}, by {summary.scorer}", *score_table(summary))
        for cluster in summary.clusters:
            if len(cluster) > 1:
                print(f"alike   {', '.join(cluster)}")
        for note in score_notes(summary):
            print(f"note    {note}")
        from deploypipe.report.html import write_scores

        path = out or Path("runs") / f"{loaded.name}-scores.html"
        write_scores(loaded.name, summary, path)
        print(f"figures {path}")


@app.command(epilog="Example: deploypipe gate runs/digits-x86_cpu --json")
def gate(
    run: RunArgument,
    json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Decide again, from the measurements of a finished run: exit 0 SHIP, 1 HOLD, 2 error."""
    with _exit_codes():
        result = load_result(run)
        from deploypipe.release.gate import decide

        decision = decide(result.benchmark, result.target.budget)
        if json:
            print(to_json(decision))
        else:
            _show_decision(decision)
    _exit_by(decision)


@app.command(epilog="Example: deploypipe report runs/digits-x86_cpu --out digits.html")
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: RUN/report.html.")] = None,
) -> None:
    """Write the report of a finished run: one HTML file that needs no network."""
    with _exit_codes():
        from deploypipe.report.html import write_report

        path = out or run / "report.html"
        write_report(load_result(run), path)
        print(path)


@app.command(epilog="Exit codes: 0 the same, 1 different, 2 unusable. Example: deploypipe verify runs/digits-x86_cpu")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with golden.json and what it lists.")],
) -> None:
    """Check the files in DIR by their hashes, and replay the samples beside them on this machine.

    Where only numpy and onnxruntime are installed: python -m deploypipe.verify DIR
    """
    with _exit_codes():
        from deploypipe.verify import HEADER, cells
        from deploypipe.verify import verify as replay

        verification = replay(folder)
        _show_table(f"Golden samples in {folder}", HEADER, cells(verification))
        for note in verification.notes:
            print(f"note: {note}")
    if not verification.is_same:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: deploypipe doctor x86_cpu")
def doctor(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="Look at this target's needs too.")] = None,
) -> None:
    """Say what this machine can do, what is missing, and how to get it. Exit 2 where it cannot run TARGET."""
    with _exit_codes():
        from deploypipe.doctor import examine

        findings = examine(load_target(target) if target else None)
        rows = [(f.name, f.status, f.detail, f.remedy) for f in findings]
        _show_table("This machine", ("what", "status", "found", "remedy"), rows)
        can_run = not any(f.name.startswith("target ") and f.status == "missing" for f in findings)
    if not can_run:
        raise typer.Exit(EXIT_ERROR)


@app.command(epilog="Example: deploypipe init my_model && deploypipe run my_model my_model")
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new pipeline, a Python identifier.")],
) -> None:
    """Write a commented pipeline (pipelines/NAME.py) and target (targets/NAME.toml) that run as they are."""
    with _exit_codes():
        if not name.isidentifier():
            raise ConfigError("init", name, "is not a Python identifier", "use letters, digits and underscores")
        texts = {
            Path("pipelines") / f"{name}.py": _template("pipeline.py.txt"),
            Path("targets") / f"{name}.toml": _template("target.toml"),
        }
        for path in texts:
            if path.exists():
                raise ConfigError(str(path), "", "is there already", "choose another name, or move the file away")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path)
        print(f"Put your network and data in, or try it as it is: deploypipe run {name} {name}")


@app.command(epilog="Example: deploypipe bench model.onnx x86_cpu --against dense.onnx --parts latency,memory")
def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file, not only one of ours.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A TOML file, or the name of one in targets/.")],
    against: Annotated[Path | None, typer.Option(help="Another file, timed in turns with FILE.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="One batch, .npz or .safetensors. Default: random.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1x128", help="Shape of a random input whose axes are open. May be repeated."),
    ] = None,
    parts: Annotated[
        str, typer.Option(help="What to measure: latency,memory,cold start,layers,batches,threads,energy.")
    ] = "all",
    samples: Annotated[
        int | None, typer.Option(help="Timed runs of each file. Default: about two seconds of them.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the figures as JSON too.")] = None,
) -> None:
    """Measure FILE on TARGET: latency, throughput, memory, cold start, time by layer, energy.

    Noise is measured too: an interval for each latency, and a verdict on the machine (steady, throttled, noisy).
    """
    with _exit_codes():
        device, shapes = load_target(target), _parse_shapes(shape or [])
        from deploypipe.benchmark.bench import PARTS, bench_file  # late: as in `run`

        chosen = PARTS if parts == "all" else tuple(part.strip() for part in parts.split(","))
        with _shown_stages(PARTS) as notify:
            result = bench_file(
                file, device, against, inputs, shapes=shapes, parts=chosen, num_samples=samples, notify=notify
            )
        _show_bench(result)
        if json:
            write_atomically(json, to_json(result).encode())


@app.command()
def targets() -> None:
    """List the targets that have a name (those in targets/), and what this machine can do for each.

    run: measured here. build only: an engine is built here and nothing is measured. export only: an ONNX file.
    """
    with _exit_codes():
        from deploypipe.runtimes.ability import can

        rows = []
        for name, path in sorted(_named_targets().items()):
            device = load_target(str(path))
            limits = [f"{key} {getattr(device.budget, key)}" for key in device.budget.limits()]
            bounds = ", ".join([*limits, f"accuracy_drop_pp {device.budget.accuracy_drop_pp:g}"])
            ability = can(device)
            rows.append((name, ability.verdict, ability.reason, device.runtime, device.description, bounds, str(path)))
        header = ("name", "this machine", "why", "runtime", "description", "budget", "file")
        _show_table("Targets", header, rows)


@app.command(epilog="Example: deploypipe reproduce digits linear --out bug")
def reproduce(
    pipeline: PipelineArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A structure that cannot be removed.")],
    out: Annotated[Path, typer.Option(help="Folder. Default: reproduction.")] = Path("reproduction"),
) -> None:
    """Write the smallest part of PIPELINE's network in which NAME cannot be removed, for a bug report.

    Weights and inputs in it are random; its README.md quotes names of classes and files: read it before you send it.
    """
    with _exit_codes():
        from deploypipe.pipeline_module import load_pipeline
        from deploypipe.pruning.reproduction import write_reproduction
        from deploypipe.task import take_calib

        loaded = load_pipeline(pipeline, {})
        with loaded.blame("the reproduction"):
            ((inputs, _),) = take_calib(loaded.load_data().calib, 2)[:1]
            found = write_reproduction(loaded.build_model(), inputs, name, out)
        print(f"part    {found.module or 'the whole network'}")
        print(f"reason  {found.reason}")
        print(f"folder  {found.folder}")


@plans.command("show", epilog="Example: deploypipe plan show runs/digits-x86_cpu")
def plan_show(plan: Annotated[Path, typer.Argument(metavar="PLAN", help=_PLAN_HELP)]) -> None:
    """Show what PLAN removes: the width of each group before and after, and the blocks."""
    with _exit_codes():
        loaded = load_plan(plan)
        _show_table(
            f"Plan for model {loaded.model_fingerprint}", ("group", "width", "asked", "reason"), plan_rows(loaded)
        )
        print(f"removed blocks: {', '.join(loaded.blocks) or 'none'}")
        print(f"edited modules: {len({edit.module for edit in loaded.edits})}")


@plans.command("diff", epilog="Exit codes: 0 equal, 1 different, 2 error. Example: deploypipe plan diff runs/a runs/b")
def plan_diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help=_PLAN_HELP)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help=_PLAN_HELP)],
) -> None:
    """Show what FIRST and SECOND remove differently; equal are plans that remove the same from the same model."""
    with _exit_codes():
        rows = plan_differences(load_plan(first), load_plan(second))
        if rows:
            _show_table("Differences", ("what", "first", "second", "the second"), rows)
        else:
            print("equal")
    if rows:
        raise typer.Exit(EXIT_DIFFERENT)


# --- what the user names ----------------------------------------------------------------------------------------------


def load_target(name: str) -> Target:
    """The target at a path, or of a bare name; it is named after its file unless it names itself."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
    elif found := _named_targets().get(name):
        path = found
    else:
        known = ", ".join(sorted(_named_targets())) or "none is here"
        raise ConfigError(name, "", "no target of this name", f"give a TOML file, or one of: {known}")
    target = load_toml(Target, path)
    return target if target.name else replace(target, name=path.stem)


def _named_targets() -> dict[str, Path]:
    """Bare name -> file. What lies in the working folder hides what lies beside the package."""
    folders = (Path(__file__).parents[1] / "targets", Path("targets"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _split_settings(texts: Sequence[str], *, targets: bool = True) -> dict[str, dict[str, str]]:
    """`--set` texts, by what they change: the target (where there is one), the module's constants, or the recipe."""
    settings: dict[str, dict[str, str]] = {"target": {}, "pipeline": {}, "recipe": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError("--set", text, "is not KEY=VALUE", "write it like --set search.num_trials=4")
        owner, _, rest = key.partition(".")
        if owner == "target" and not targets:
            raise ConfigError("--set", key, "there is no target here", "leave it out, or give it to `deploypipe run`")
        if owner in ("target", "pipeline") and rest:
            settings[owner][rest] = value
        else:
            settings["recipe"][key] = value
    return settings


def _parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`--shape` texts, NAME=1x128 (NAME= for a scalar)."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x") if sizes else []
        if not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError("--shape", text, "is no shape", "write it like --shape input_ids=1x128")
        shapes[name] = tuple(map(int, parts))
    return shapes


def _template(name: str) -> str:
    return (resources.files("deploypipe") / "templates" / name).read_text(encoding="utf-8")


# --- what the user sees -----------------------------------------------------------------------------------------------


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Every failure leaves with its own code: HOLD (1) is a decision and never an accident."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except DeploypipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            print(f"error: {error.filename}: {error.strerror}; check the path and its rights", file=sys.stderr)
            raise typer.Exit(EXIT_ERROR) from None
        traceback.print_exc()
        print("error: this is a bug in deploypipe; please report it with the lines above", file=sys.stderr)
        raise typer.Exit(EXIT_ERROR) from None


def _exit_by(decision: GateDecision) -> None:
    if decision.verdict is not Verdict.SHIP:
        raise typer.Exit(EXIT_HOLD)


@contextmanager
def _shown_stages(names: Sequence[str] = STAGES) -> "Iterator[_PlainStages | _LiveStages]":
    """A listener for the events of stages with these names: a live list in a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield _PlainStages()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[note]:>13}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        stages = _LiveStages(progress, names)
        yield stages
        stages.end()


class _PlainStages:
    """One line for each stage that ends, and a few while it lasts.

    Work inside a stage (one trial's repair, the timed runs) has events under its own name: it moves the stage's line
    on, but it is no measure of the time that the stage has left.
    """

    def __init__(self) -> None:
        self.stage, self.begun, self.shown = "", 0.0, 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.message.startswith("WARNING"):
            print(event.message, file=sys.stderr, flush=True)
        elif event.message == "start":
            self.stage, self.begun, self.shown = event.stage, now, now
        elif event.message == "cached":
            print(f"{event.stage:<11} cached", flush=True)
        elif event.message == "done":
            print(f"{event.stage:<11} done in {seconds(now - self.begun)}", flush=True)
        elif event.total and event.done and now - self.shown > _QUIET_SECONDS:
            self.shown = now
            text = f"{event.done} of {event.total}"
            if event.stage == self.stage:
                left = (now - self.begun) / event.done * (event.total - event.done)
                text += f", about {seconds(left)} left"
            else:
                text = f"{event.stage} {text}"
            print(f"{self.stage:<11} {text}", flush=True)


class _LiveStages:
    """All stages, with a bar for the one at work."""

    def __init__(self, progress: Progress, names: Sequence[str]) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {stage: self._add(stage) for stage in names}
        self.stage = ""

    def __call__(self, event: Event) -> None:
        if event.message.startswith("WARNING"):
            self.progress.console.print(f"[yellow]{escape(event.message)}[/]")
            return
        if event.message == "start":
            self.stage = event.stage
            if event.stage not in self.tasks:
                self.tasks[event.stage] = self._add(event.stage)
            self.progress.start_task(self.tasks[event.stage])
        task = self.tasks.get(self.stage)
        if task is None:
            return
        if event.message in ("cached", "done"):
            self.progress.update(task, total=1, completed=1, note=event.message)
        elif event.total and event.stage == self.stage:
            self.progress.update(task, total=event.total, completed=event.done, note=f"{event.done}/{event.total}")
        elif event.total:  # work inside the stage
            self.progress.update(task, note=f"{event.stage} {event.done}/{event.total}")

    def end(self) -> None:
        """Stages that were not needed leave the list."""
        for task in self.progress.tasks:
            if not task.started:
                self.progress.remove_task(task.id)

    def _add(self, stage: str) -> TaskID:
        return self.progress.add_task(stage, total=None, start=False, note="")


def _show_result(result: RunResult, folder: Path) -> None:
    rows = [(row.name, row.dense, row.compressed, row.change) for row in before_after(result)]
    _show_table(f"{result.pipeline} on {result.target.name}", ("", "dense", "compressed", "change"), rows)
    if result.precision:
        _show_table("Precisions", PRECISION_HEADER, precision_rows(result.precision))
    for note in result.benchmark.notes:
        print(f"note: {note}")
    _show_decision(result.decision)
    print(f"ONNX    {folder / 'model.onnx'}")
    if result.engine:
        print(f"engine  {folder / 'model.engine'} ({', '.join(result.engine.key.compute_capabilities)})")
    if (folder / "report.html").is_file():
        print(f"report  {folder / 'report.html'}")
    else:
        print("report  none; pip install 'deploypipe[report]', then `deploypipe report` with this folder")


def _show_bench(result: "BenchResult") -> None:
    from deploypipe.report.bench_tables import (
        condition_rows,
        figure_rows,
        layer_rows,
        missing_lines,
        sweep_rows,
        verdict_lines,
    )

    file, other = result.file, result.against
    threads = f"{result.num_threads} thread{'s' * (result.num_threads != 1)}"
    about = f"{result.target}, {result.runtime}, batch {result.batch_size}, {threads}"
    _show_table(f"{file.path} on {about}", *figure_rows(result))
    for measured in (file, other):
        if measured and measured.layers:
            _show_table(
                f"Slowest operators of {measured.path}",
                ("node", "operator", "time", "share"),
                layer_rows(measured.layers),
            )
    for name, by_threads in (("batch", False), ("threads", True)):
        points, others = ([*(m.threads if by_threads else m.batches)] if m else [] for m in (file, other))
        if points:
            heads = (name, "latency p50", "throughput", *(("against, p50", "throughput") if others else ()))
            _show_table(f"By {name}", heads, sweep_rows(points, others, by_threads=by_threads))
    _show_table("The machine meanwhile", ("", "before", "after"), condition_rows(result.conditions))
    for line in (*missing_lines(result), *result.notes, *verdict_lines(result)):
        print(line)


def _show_decision(decision: GateDecision) -> None:
    cells = [check_cells(check) for check in decision.checks]
    _show_table("Gate", ("check", "status", "measured", "limit", "reason"), cells)
    colour = "green" if decision.verdict is Verdict.SHIP else "red"
    Console(soft_wrap=True).print(
        f"[bold {colour}]{decision.verdict.value}[/]: {escape(decision.reason)}", highlight=False
    )


def _show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        lines = [list(header), *map(list, rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        print(f"\n{title}")
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"[{COLOURS[c]}]{c}[/]" if c in COLOURS else escape(c) for c in row))
    console.print(table)
