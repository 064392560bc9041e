"""The application, and the options that several commands take.

Commands import what they need inside of their functions, so that `--help`, `--version` and an argument error are fast.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from deploypipe.installed_packages import find_package
from deploypipe.provider_options import ALLOWED_BY, OPTION

# The groups of commands in `deploypipe --help`.
COMPRESS, LOOK, RELEASE = "Compress", "Look and measure", "Release"
LARGE, DEVELOPER = "Large and distributed", "Help a developer"

app = typer.Typer(
    name="deploypipe",
    epilog="Exit codes: 0 SHIP, 1 HOLD, 2 error, 130 interrupted. Begin with: deploypipe run digits x86_cpu",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
plans = typer.Typer(help="Show a pruning plan, or compare two.", no_args_is_help=True)
app.add_typer(plans, name="plan", rich_help_panel=LOOK)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
PLAN_HELP = "A plan.json, or the folder of a finished run."
PipelineArgument = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A Python file, or the name of one in pipelines/.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one field: search.num_trials=4 (recipe), target.budget.latency_p50=0.5x (target), "
        "pipeline.WEIGHTS=w.safetensors (constant of the pipeline module). May be repeated.",
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0.1, max=1e6, help="Time limit to load a model file and run it once."),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        metavar="MIB",
        min=1,
        max=2**30,
        help="Memory limit of that run (Linux, on the CPU). Default: three quarters of the free memory.",
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"deploypipe {find_package('deploypipe').version}")
        raise typer.Exit


@app.callback()
def main_options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a trained PyTorch network for one device, measure it there, and decide: SHIP or HOLD."""


def _allow_provider_libraries(allowed: bool) -> bool:
    if allowed:
        os.environ[ALLOWED_BY] = "1"  # for the processes that this one starts, too
    return allowed


AllowOption = Annotated[
    bool,
    typer.Option(
        OPTION,
        callback=_allow_provider_libraries,
        help="Allow the target's provider_options to load libraries and access files. Only for targets you trust.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        envvar="DEPLOYPIPE_STORAGE",
        help="Database shared by the workers of a search: postgresql://USER:PASSWORD@HOST/NAME, or sqlite:///FILE for "
        "processes on one machine.",
    ),
]
