"""Help with a search that another process runs."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploypipe.cli.app import AllowOption, StorageOption, app
from deploypipe.cli.named import require_name
from deploypipe.cli.terminal import exit_codes, shown_stages
from deploypipe.errors import ConfigError, StorageError
from deploypipe.jsonio import from_plain

if TYPE_CHECKING:
    from deploypipe.search.storage import Storage

_POLL_S = 2.0


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
        require_name(run, "--run", "the search's name")
        from deploypipe.search.storage import Storage  # late: bring torch and more, which `--help` need not wait for

        shared = Storage(url=storage, study=run)
        job = _wait_for_job(shared, wait)
        from deploypipe.pipeline import help_search
        from deploypipe.pipeline_module import load_pipeline
        from deploypipe.recipe import Recipe
        from deploypipe.target import Target

        loaded = load_pipeline(job["pipeline"], job["constants"])
        recipe = from_plain(Recipe, job["recipe"], shared.shown)
        target = from_plain(Target, job["target"], shared.shown)
        with loaded.blame("the worker"):
            model, splits = loaded.build_model(), loaded.load_data()
        with shown_stages() as notify, loaded.blame("the worker"):
            found = help_search(
                model,
                splits,
                loaded.task(),
                recipe,
                target,
                replace(shared, stages=job["stages"]),
                source=loaded.source,
                notify=notify,
            )
        print(f"{run}: all {len(found.trials)} trials are done")


def _wait_for_job(storage: "Storage", seconds: float) -> dict[str, Any]:
    from deploypipe.search.board import read_job

    until, is_told = time.monotonic() + seconds, False
    while (job := read_job(storage)) is None:
        if time.monotonic() > until:
            raise StorageError(
                f"{storage.shown}: no search {storage.study!r} began here within {seconds:g} s; start it by "
                f"`deploypipe run ... --storage ... --name {storage.study}`, or give the worker more time with --wait"
            )
        if not is_told:
            print(f"waiting for the search {storage.study!r} to begin", flush=True)
            is_told = True
        time.sleep(_POLL_S)
    return job
