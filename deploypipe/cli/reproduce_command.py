"""The command `reproduce`: a bug report about what cannot be removed."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import DEVELOPER, PipelineArgument, app
from deploypipe.cli.exit_codes import exit_codes, say


@app.command(rich_help_panel=DEVELOPER, epilog="Example: deploypipe reproduce digits linear --out bug")
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
