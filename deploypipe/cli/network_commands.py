"""Try a pipeline, and look at what is redundant in its network."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import COMPRESS, LOOK, PipelineArgument, SetOption, app
from deploypipe.cli.exit_codes import EXIT_ERROR, exit_codes, say


@app.command(rich_help_panel=COMPRESS, epilog="Example: deploypipe check digits x86_cpu")
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
        from deploypipe.cli.loading import load_libraries, load_network_and_data
        from deploypipe.cli.stage_display import shown_stages
        from deploypipe.cli.terminal import show_table
        from deploypipe.files.json_records import override
        from deploypipe.records import reported
        from deploypipe.target_files import load_target

        settings = split_settings(set_ or [])
        device = override(load_target(target), settings["target"], "--set target") if target else None
        load_libraries()
        from deploypipe.preflight import check as check_pipeline  # late: as in `run`
        from deploypipe.target import Target
        from deploypipe.user_pipeline import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        with shown_stages() as notify:
            network, data = load_network_and_data(loaded, notify)
            with reported(notify, "check"):
                report = check_pipeline(network, data, loaded.task(), recipe, device or Target(runtime="onnxruntime"))
        rows = [(row.what, row.detail, f"{row.seconds:.1f} s") for row in report.tried]
        show_table(f"Tried for {loaded.name}", ("what", "found", "time"), rows)
        for note in report.notes:
            say(f"note    {note}")
        for number, complaint in enumerate(report.complaints, start=1):
            say(f"error: {number} of {len(report.complaints)}: {complaint}", file=sys.stderr)
    if not report.is_ready:
        raise typer.Exit(EXIT_ERROR)
    say("ready to run")


@app.command(rich_help_panel=LOOK, epilog="Example: deploypipe score digits --set score.kind=output_error")
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
        from deploypipe.scoring.summarise_scores import summarise_scores
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
