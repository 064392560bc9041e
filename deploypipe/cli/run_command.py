"""`deploypipe run`: its options. What it does is in `run_targets`, imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import COMPRESS, AllowOption, PipelineArgument, SetOption, StorageOption, app
from deploypipe.cli.exit_codes import exit_codes


@app.command(
    rich_help_panel=COMPRESS,
    epilog="Example: deploypipe run digits x86_cpu --set search.num_trials=4 --set target.num_threads=2",
)
def run(
    pipeline: PipelineArgument,
    target: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="TOML files, or names of targets (`deploypipe targets`).")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/PIPELINE-TARGET; for several targets runs/PIPELINE.")
    ] = None,
    set_: SetOption = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of trials of the search: short for --set search.num_trials=N.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Time limit of the search: short for --set search.max_minutes=M. No trial begins later, and the best "
            "one so far wins. The other stages take as long as they take.",
        ),
    ] = None,
    ship_trial: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Ship trial N of the finished search in the run folder instead of its winner, in a folder of its own, "
            "RUN-trial-N. Nothing is searched again.",
        ),
    ] = None,
    storage: StorageOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the search in --storage. Default: the name of the run folder.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            envvar="DEPLOYPIPE_STAGES",
            help="Where workers read the stages before the search: a folder, s3://... or gs://... Default: the run "
            "folder, if workers can read it.",
        ),
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results that do not depend on the target; runs for other targets reuse them, also at the "
            "same time. Default for several targets: shared/ in the run folder."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Number of targets at a time. They share the cores; while one measures, the others pause.",
        ),
    ] = 1,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Repeat the final benchmark, even if the machine was steady.")
    ] = False,
    fast_dev_run: Annotated[
        bool,
        typer.Option(
            "--fast-dev-run",
            help="Try every stage on two batches, with two trials and one training step, in about a minute. The result "
            "never ships; its folder ends in -fast-dev-run.",
        ),
    ] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write TensorBoard event files there while the run goes on. With MLFLOW_TRACKING_URI set, the run is "
            "tracked in MLflow too.",
        ),
    ] = None,
    _allow: AllowOption = False,
) -> None:
    """Compress PIPELINE's network for TARGET, or for several targets.

    The same command resumes an interrupted run. It repeats the benchmark if the machine was not steady. A run ends with
    SHIP (exit 0) or HOLD (1). Several targets share all results that do not depend on the target, also with a target
    that is added later; the exit code is the worst one. With --storage, any number of `deploypipe worker` processes can
    help with the search; the result is the same.
    Fine-tuning on four GPUs: torchrun --nproc-per-node 4 -m deploypipe run PIPELINE TARGET.
    """
    with exit_codes():
        from deploypipe.cli.arguments import with_search_bounds
        from deploypipe.cli.loading import load_libraries
        from deploypipe.cli.run_targets import RunArguments, run_at_once, run_in_turn
        from deploypipe.cli.terminal import joined_ranks

        changes = with_search_bounds(set_ or [], trials, minutes)
        asked = RunArguments(
            pipeline,
            target,
            changes,
            out,
            storage,
            name,
            stages,
            shared,
            remeasure,
            fast_dev_run,
            ship_trial,
            tensorboard,
        )
        asked.check_targets()
        load_libraries()
        with joined_ranks() as ranks:
            code = run_at_once(asked, jobs, ranks) if jobs > 1 and len(target) > 1 else run_in_turn(asked, ranks)
    raise typer.Exit(code)
