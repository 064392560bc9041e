"""Compress, look, measure."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import (
    PLAN_HELP,
    AllowOption,
    MemoryLimit,
    PipelineArgument,
    RunArgument,
    SetOption,
    TimeLimit,
    app,
    plans,
)
from deploypipe.cli.exit_codes import EXIT_DIFFERENT, EXIT_ERROR, exit_codes, say
from deploypipe.errors import ConfigError


@app.command(epilog="Example: deploypipe score digits --set score.kind=output_error")
def score(
    pipeline: PipelineArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: runs/PIPELINE-scores.html.")] = None,
    set_: SetOption = None,
) -> None:
    """Show how much of PIPELINE's network is redundant, layer by layer, and which of its blocks are similar.

    Needs one pass over the calibration samples; nothing is removed. The scorer is the recipe's. Try another one with
    --set score.kind=KIND: magnitude, mipp, layerwise_mi, output_error, conditional_mi, label_mi, taylor, fpgm,
    batch_norm_scale or random.
    """
    with exit_codes():
        from deploypipe.cli.arguments import split_settings
        from deploypipe.cli.loading import load_libraries, load_network_and_data
        from deploypipe.cli.stage_display import shown_stages
        from deploypipe.cli.terminal import show_table
        from deploypipe.files.json_records import override
        from deploypipe.report.score_tables import score_notes, score_table

        settings = split_settings(set_ or [], targets=False)
        load_libraries()
        from deploypipe.pipeline import summarise_scores
        from deploypipe.user_pipeline import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        with shown_stages() as notify:
            summary = summarise_scores(*load_network_and_data(loaded, notify), loaded.task(), recipe, notify=notify)
        show_table(f"Redundant units in {loaded.name}, by {summary.scorer}", *score_table(summary))
        for cluster in summary.clusters:
            if len(cluster) > 1:
                say(f"similar {', '.join(cluster)}")
        for note in score_notes(summary):
            say(f"note    {note}")
        from deploypipe.report.html import write_scores

        path = out or Path("runs") / f"{loaded.name}-scores.html"
        write_scores(loaded.name, summary, path)
        say(f"figures {path}")


@app.command(epilog="Example: deploypipe report runs/digits-x86_cpu --out digits.html")
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file. Default: RUN/report.html.")] = None,
) -> None:
    """Write the report of a finished run: one HTML file that needs no network."""
    with exit_codes():
        from deploypipe.report.html import write_report
        from deploypipe.runs.result import load_result

        path = out or run / "report.html"
        write_report(load_result(run), path)
        say(path)


@app.command(epilog="Example: deploypipe compare runs/digits-x86_cpu runs/digits-x86_server")
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a finished run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another finished run.")],
) -> None:
    """Compare the models that two runs ship, figure by figure, and what the two removed."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_differences
        from deploypipe.report.run_tables import COMPARISON_HEADER, comparison_rows
        from deploypipe.runs.result import load_plan, load_result

        results = load_result(first), load_result(second)
        show_table(f"{first} and {second}", COMPARISON_HEADER, comparison_rows(*results))
        if all(result.search for result in results):
            rows = plan_differences(load_plan(first), load_plan(second))
            if rows:
                show_table("Differences of their plans", ("what", "first", "second", "the second"), rows)
            else:
                say("their plans are equal")


@app.command(epilog="Example: deploypipe doctor x86_cpu")
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="Also check the needs of this target.")
    ] = None,
) -> None:
    """Show what this machine can do, what is missing, and how to install it. Exit 2 if it cannot run TARGET."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.doctor import examine
        from deploypipe.target_files import load_target

        findings = examine(load_target(target) if target else None)
        rows = [(f.name, f.status, f.detail, f.remedy) for f in findings]
        show_table("This machine", ("what", "status", "found", "remedy"), rows)
        can_run = not any(f.name.startswith("target ") and f.status == "missing" for f in findings)
    if not can_run:
        raise typer.Exit(EXIT_ERROR)


@app.command(epilog="Example: deploypipe check digits x86_cpu")
def check(
    pipeline: PipelineArgument,
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="Target to check for. Default: onnxruntime on this machine."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Try everything that a run of PIPELINE for TARGET needs on one batch, in seconds, and list all problems.

    Every run starts with the same checks, except the export. Exit 2 if there is a problem.
    """
    with exit_codes():
        from deploypipe.cli.arguments import split_settings
        from deploypipe.cli.terminal import show_table
        from deploypipe.files.json_records import override
        from deploypipe.target_files import load_target

        settings = split_settings(set_ or [])
        device = override(load_target(target), settings["target"], "--set target") if target else None
        from deploypipe.preflight import check as check_pipeline  # late: as in `run`
        from deploypipe.target import Target
        from deploypipe.user_pipeline import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        report = check_pipeline(
            loaded.build_model(), loaded.load_data(), loaded.task(), recipe, device or Target(runtime="onnxruntime")
        )
        rows = [(row.what, row.detail, f"{row.seconds:.1f} s") for row in report.tried]
        show_table(f"Tried for {loaded.name}", ("what", "found", "time"), rows)
        for note in report.notes:
            say(f"note    {note}")
        for number, complaint in enumerate(report.complaints, start=1):
            say(f"error: {number} of {len(report.complaints)}: {complaint}", file=sys.stderr)
    if not report.is_ready:
        raise typer.Exit(EXIT_ERROR)
    say("ready to run")


@app.command(epilog="Example: deploypipe init my_model && deploypipe run my_model my_model")
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new pipeline, a Python identifier.")],
) -> None:
    """Write a commented pipeline (pipelines/NAME.py) and target (targets/NAME.toml) that run as they are."""
    with exit_codes():
        from deploypipe.cli.arguments import require_name, template
        from deploypipe.files.atomic import write_atomically

        if not name.isidentifier():
            raise ConfigError("init", name, "is not a Python identifier", "use letters, digits and underscores")
        require_name(name, "init")
        texts = {
            Path("pipelines") / f"{name}.py": template("pipeline.py.txt"),
            Path("targets") / f"{name}.toml": template("target.toml"),
        }
        for path in texts:
            if path.exists():
                raise ConfigError(str(path), "", "exists already", "choose another name, or move the file away")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
            say(path)
        say(f"Put your network and data in, or try it as it is: deploypipe run {name} {name}")


@app.command(epilog="Example: deploypipe bench model.onnx x86_cpu --against dense.onnx --parts latency,memory")
def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any ONNX file.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A TOML file, or the name of a target (`deploypipe targets`).")
    ],
    against: Annotated[
        Path | None, typer.Option(help="Another file to compare with, timed in turns with FILE.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="One batch of inputs, .npz or .safetensors. Default: random.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1x128", help="Shape of a random input with dynamic axes. May be repeated."),
    ] = None,
    parts: Annotated[
        str, typer.Option(help="What to measure: latency,memory,cold start,layers,batches,threads,energy.")
    ] = "all",
    samples: Annotated[
        int | None, typer.Option(help="Number of timed runs of each file. Default: about two seconds of runs.")
    ] = None,
    trust_program: Annotated[
        bool,
        typer.Option(
            "--trust-program",
            help="Open a .pt2 FILE. It can run any code on this machine: only for files from someone you trust.",
        ),
    ] = False,
    time_limit: TimeLimit = 120.0,
    memory_limit: MemoryLimit = None,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Also write the figures to this JSON file.")] = None,
    _allow: AllowOption = False,
) -> None:
    """Measure FILE on TARGET: latency, throughput, memory, cold start, time by layer, energy.

    Each latency has an interval, and the machine a verdict: steady, throttled or noisy.
    """
    with exit_codes():
        from deploypipe.cli.arguments import parse_shapes
        from deploypipe.cli.stage_display import shown_stages
        from deploypipe.cli.terminal import show_bench
        from deploypipe.files.atomic import write_atomically
        from deploypipe.files.json_records import to_json
        from deploypipe.target_files import load_target
        from deploypipe.untrusted_files.limited_process import ProcessLimits

        device, shapes = load_target(target), parse_shapes(shape or [])
        from deploypipe.benchmark.bench_file import PARTS, bench_file  # late: as in `run`

        chosen = PARTS if parts == "all" else tuple(part.strip() for part in parts.split(","))
        with shown_stages() as notify:
            result = bench_file(
                file,
                device,
                against,
                inputs,
                shapes=shapes,
                parts=chosen,
                num_samples=samples,
                trust_program=trust_program,
                limits=ProcessLimits(seconds=time_limit, memory_mib=memory_limit),
                notify=notify,
            )
        show_bench(result)
        if json:
            write_atomically(json, to_json(result).encode())


@app.command()
def targets() -> None:
    """List the targets that have a name (those in targets/), and what this machine can do for each.

    run: exports and measures here. build only: builds an engine here, measures nothing. export only: an ONNX file.
    """
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.runtimes.ability_for_target import can
        from deploypipe.target_files import load_target, named_targets

        rows = []
        for name, path in sorted(named_targets().items()):
            device = load_target(str(path))
            limits = [f"{key} {getattr(device.budget, key)}" for key in device.budget.limits()]
            bounds = ", ".join([*limits, f"accuracy_drop_pp {device.budget.accuracy_drop_pp:g}"])
            ability = can(device)
            rows.append((name, ability.verdict, ability.reason, device.runtime, device.description, bounds, str(path)))
        header = ("name", "this machine", "why", "runtime", "description", "budget", "file")
        show_table("Targets", header, rows)


@app.command(epilog="Example: deploypipe reproduce digits linear --out bug")
def reproduce(
    pipeline: PipelineArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a structure that cannot be removed.")],
    out: Annotated[Path, typer.Option(help="Folder of the bug report.")] = Path("reproduction"),
) -> None:
    """Write a bug report: the smallest part of PIPELINE's network in which NAME cannot be removed.

    Its weights and inputs are random. Its README.md quotes names of classes and files: read it before you send it.
    """
    with exit_codes():
        from deploypipe.pruning.tracing.bug_report import write_reproduction
        from deploypipe.task import take_calib
        from deploypipe.user_pipeline import load_pipeline

        loaded = load_pipeline(pipeline, {})
        ((inputs, _),) = take_calib(loaded.load_data().calib, 2)[:1]
        found = write_reproduction(loaded.build_model(), inputs, name, out)
        say(f"part    {found.module or 'the whole network'}")
        say(f"reason  {found.reason}")
        say(f"folder  {found.folder}")


@plans.command("show", epilog="Example: deploypipe plan show runs/digits-x86_cpu")
def plan_show(plan: Annotated[Path, typer.Argument(metavar="PLAN", help=PLAN_HELP)]) -> None:
    """Show what PLAN removes: blocks, and each group's width before and after."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_rows
        from deploypipe.runs.result import load_plan

        loaded = load_plan(plan)
        show_table(
            f"Plan for model {loaded.model_fingerprint}", ("group", "width", "asked", "reason"), plan_rows(loaded)
        )
        say(f"removed blocks: {', '.join(loaded.blocks) or 'none'}")
        say(f"edited modules: {len({edit.module for edit in loaded.edits})}")


@plans.command("diff", epilog="Exit codes: 0 equal, 1 different, 2 error. Example: deploypipe plan diff runs/a runs/b")
def plan_diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help=PLAN_HELP)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help=PLAN_HELP)],
) -> None:
    """Show how FIRST and SECOND differ. Two plans are equal if they remove the same from the same model."""
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.report.plan_tables import plan_differences
        from deploypipe.runs.result import load_plan

        rows = plan_differences(load_plan(first), load_plan(second))
        if rows:
            show_table("Differences", ("what", "first", "second", "the second"), rows)
        else:
            say("equal")
    if rows:
        raise typer.Exit(EXIT_DIFFERENT)
