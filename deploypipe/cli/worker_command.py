"""`deploypipe worker`: its options. What it does is in `join_search`, imported when it runs."""

from typing import Annotated

import typer

from deploypipe.cli.app import LARGE, AllowOption, StorageOption, app
from deploypipe.cli.exit_codes import exit_codes
from deploypipe.errors import ConfigError


@app.command(
    rich_help_panel=LARGE,
    epilog="Example: deploypipe worker --storage postgresql://me@db/searches --run digits-x86_cpu",
)
def worker(
    run: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the search: the name of its run folder, or the run's --name.")
    ],
    storage: StorageOption = None,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the search to start.")] = 600.0,
    _allow: AllowOption = False,
) -> None:
    """Run trials of a search that `deploypipe run --storage` started, here or on another machine, until all are done.

    The pipeline, data, packages and kind of device must be those of the run; a difference is an error. A worker can be
    started before the run and stopped at any time. Start up to `search.num_parallel` of them. Exit 0 when the search
    has ended.
    """
    with exit_codes():
        if not storage:
            raise ConfigError("--storage", "", "is not given", "give the address that `deploypipe run` was given")
        from deploypipe.cli.join_search import join_search

        join_search(run, storage, wait)
