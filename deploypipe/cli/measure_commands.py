"""Measure model files, and examine what this machine can measure."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import LOOK, AllowOption, MemoryLimit, TimeLimit, app
from deploypipe.cli.exit_codes import EXIT_ERROR, exit_codes, say
from deploypipe.errors import ConfigError

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show all columns, however wide.")]


@app.command(rich_help_panel=LOOK, epilog="Example: deploypipe doctor x86_cpu")
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="Also check the needs of this target.")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Show what this machine can do, what is missing, and how to install it. Exit 2 if it cannot run TARGET."""
    with exit_codes():
        from deploypipe.cli.terminal import show_paragraph, show_table
        from deploypipe.doctor import examine
        from deploypipe.target_files import load_target

        findings = examine(load_target(target) if target else None)
        if verbose:
            rows = [(f.name, f.status, f.detail, f.remedy) for f in findings]
            show_table("This machine", ("what", "status", "found", "remedy"), rows)
        else:
            show_table("This machine", ("what", "status", "found"), [(f.name, f.status, f.brief) for f in findings])
            for finding in findings:
                if finding.remedy:
                    show_paragraph(f"{finding.name}: {finding.remedy}")
        can_run = not any(f.name.startswith("target ") and f.status == "missing" for f in findings)
    if not can_run:
        raise typer.Exit(EXIT_ERROR)


@app.command(
    rich_help_panel=LOOK,
    epilog="Example: deploypipe bench model.onnx x86_cpu --against dense.onnx --parts latency,memory",
)
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


@app.command(rich_help_panel=LOOK)
def targets(verbose: VerboseOption = False) -> None:
    """List the targets that have a name (those in targets/), and what this machine can do for each.

    run: exports and measures here. build only: builds an engine here, measures nothing. export only: an ONNX file.
    A file that cannot be read is named below the table. Exit 2 if none can be read.
    """
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.runtimes.ability_for_target import can
        from deploypipe.target_files import load_target, named_targets

        rows, problems = [], list[ConfigError]()
        for name, path in sorted(named_targets().items()):
            try:
                device = load_target(str(path))
            except ConfigError as error:
                problems.append(error)
                continue
            limits = [f"{key} {getattr(device.budget, key)}" for key in device.budget.limits()]
            bounds = ", ".join([*limits, f"accuracy_drop_pp {device.budget.accuracy_drop_pp:g}"])
            ability = can(device)
            rows.append((name, ability.verdict, device.description, ability.reason, device.runtime, bounds, str(path)))
        header = ("name", "this machine", "description", "why", "runtime", "budget", "file")
        num_shown = len(header) if verbose else 3
        if rows or not problems:
            show_table("Targets", header[:num_shown], [row[:num_shown] for row in rows])
        for problem in problems:
            say(f"cannot be read: {problem}", file=sys.stderr)
    if problems and not rows:
        raise typer.Exit(EXIT_ERROR)
