"""`deploypipe run`: its options. What it does is in `run_targets`, imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import AllowOption, PipelineArgument, SetOption, StorageOption, app
from deploypipe.cli.exit_codes import exit_codes


@app.command(epilog="Example: deploypipe run digits x86_cpu --set search.num_trials=4 --set target.num_threads=2")
def run(
    pipeline: PipelineArgument,
    target: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="TOML files, or the names of those in targets/.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/PIPELINE-TARGET; for several targets runs/PIPELINE.")
    ] = None,
    set_: SetOption = None,
    storage: StorageOption = None,
    name: Annotated[
        str | None, typer.Option(help="The search's name in --storage. Default: that of the run folder.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            envvar="DEPLOYPIPE_STAGES",
            help="Where workers find what is computed before the search: a folder, or s3://..., gs://... Default: the "
            "run folder, for workers that see it.",
        ),
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what does not depend on the target, where runs for other targets find it, also at the "
            "same time. Default: shared/ in the folder of several targets."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="How many targets at a time. They share the cores, and stand still while one of them measures.",
        ),
    ] = 1,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure what ships again, also where the machine was steady.")
    ] = False,
    _allow: AllowOption = False,
) -> None:
    """Compress PIPELINE's network for TARGET, or for several targets.

    A run that was interrupted continues where it stopped, with the same command; one whose machine was not steady when
    it measured measures again. Ends with SHIP (exit 0) or HOLD (1).
    Several targets share what does not depend on them, also with one that is added later; the exit code is the worst.
    With --storage, any number of `deploypipe worker` may help with the search; the result is the same.
    Fine-tuning on four GPUs: torchrun --nproc-per-node 4 -m deploypipe run PIPELINE TARGET.
    """
    with exit_codes():
        from deploypipe.cli.run_targets import RunArguments, run_at_once, run_in_turn
        from deploypipe.cli.terminal import joined_ranks

        asked = RunArguments(pipeline, target, set_ or [], out, storage, name, stages, shared, remeasure)
        with joined_ranks() as ranks:
            code = run_at_once(asked, jobs, ranks) if jobs > 1 and len(target) > 1 else run_in_turn(asked, ranks)
    raise typer.Exit(code)
