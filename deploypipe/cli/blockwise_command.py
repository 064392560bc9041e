"""The command `blockwise`: prune a network that does not fit into memory twice."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import LARGE, PipelineArgument, SetOption, app
from deploypipe.cli.exit_codes import exit_codes, say

_STAGE = "blocks"


@app.command(
    rich_help_panel=LARGE, epilog="Example: deploypipe blockwise my_llama model.safetensors.index.json --kept 0.75"
)
def blockwise(
    pipeline: PipelineArgument,
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="A .safetensors file, or the .index.json of several.")
    ],
    kept: Annotated[
        float, typer.Option(metavar="SHARE", help="Share to keep of every group of units and heads in the blocks.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/PIPELINE-blockwise.")] = None,
    channel_multiple: Annotated[int, typer.Option(min=1, help="Keep widths at multiples of this number.")] = 1,
    block: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A block; repeat for each, in order. Default: the longest list of equal modules."
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Prune the blocks of PIPELINE's network one by one, for a network that does not fit into memory twice.

    Weights are read from WEIGHTS, block by block; weights that build_model() loads are ignored. Every group keeps the
    same share; there is no search, fine-tuning or export. The same command resumes after an interruption. Load the
    result in Python with deploypipe.load_pruned(FOLDER, build_model).
    """
    with exit_codes():
        from deploypipe.cli.arguments import split_settings
        from deploypipe.cli.stage_display import shown_stages
        from deploypipe.files.json_records import override
        from deploypipe.records import Event, Finished, Note, Progress, Started

        settings = split_settings(set_ or [], targets=False)
        from deploypipe.blockwise import prune_blockwise  # late: brings torch, which `--help` need not wait for
        from deploypipe.task import take_calib
        from deploypipe.user_pipeline import load_pipeline

        loaded = load_pipeline(pipeline, settings["pipeline"])
        recipe = override(loaded.recipe(), settings["recipe"])
        folder = out or Path("runs") / f"{loaded.name}-blockwise"
        with shown_stages() as notify:
            notify(Started(stage=_STAGE))

            def report(event: Event) -> None:
                notify(event)
                if isinstance(event, Progress):
                    notify(Note(stage=event.stage, text=event.message))

            result = prune_blockwise(
                loaded.build_model,
                weights,
                take_calib(loaded.load_data().calib, max(recipe.observe.num_samples, recipe.repair.num_samples)),
                folder,
                recipe,
                kept=kept,
                channel_multiple=channel_multiple,
                blocks=tuple(block or ()),
                notify=report,
            )
            notify(Finished(stage=_STAGE))
        share = result.params_after / result.params_before
        say(f"parameters  {result.params_before:,} -> {result.params_after:,} ({share:.3f}x)")
        say(f"folder      {folder}")
