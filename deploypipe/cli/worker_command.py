"""`deploypipe worker`: its options. What it does is in `join_search`, imported when it runs."""

from typing import Annotated

import typer

from deploypipe.cli.app import AllowOption, StorageOption, app
from deploypipe.cli.exit_codes import exit_codes
from deploypipe.errors import ConfigError


@app.command(epilog="Example: deploypipe worker --storage postgresql://me@db/searches --run digits-x86_cpu")
def worker(
    run: Annotated[str, typer.Option(metavar="NAME", help="The search's name: that of its run folder, or --name.")],
    storage: StorageOption = None,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long the search may take to begin.")] = 600.0,
    _allow: AllowOption = False,
) -> None:
    """Do trials of a search that `deploypipe run --storage` began, on this machine or another, until all are done.

    Needs the same pipeline, data and packages as that run, and the same kind of device; says what differs otherwise.
    May be started before the run, ended at any time, and started as often as `search.num_parallel` says. Exit 0 when
    the search is over.
    """
    with exit_codes():
        if not storage:
            raise ConfigError("--storage", "", "is not given", "give the address that `deploypipe run` was given")
        from deploypipe.cli.join_search import join_search

        join_search(run, storage, wait)
