"""Help with a search that another process runs."""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploypipe.cli.app import AllowOption, StorageOption, app
from deploypipe.cli.arguments import require_name
from deploypipe.cli.terminal import exit_codes, say, shown_stages
from deploypipe.errors import ConfigError, StorageError
from deploypipe.files.json_records import from_plain
from deploypipe.recipe import Recipe
from deploypipe.runtimes.provider_options import require_harmless_options
from deploypipe.target import Target

if TYPE_CHECKING:
    from deploypipe.search.distributed.study_storage import Storage

_POLL_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedJob:
    """What a run tells its workers, as it stands in the database."""

    pipeline: str
    constants: dict[str, str]
    recipe: Recipe
    target: Target
    stages: str
    code: dict[str, str]  # what the run executes, by `pipeline_source.code_hashes`


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
        from deploypipe.search.distributed.study_storage import (
            Storage,  # late: bring torch and more, which `--help` need not wait for
        )

        shared = Storage(url=storage, study=run)
        job = from_plain(SharedJob, _wait_for_job(shared, wait), f"{shared.shown}: {run}")
        _require_same_code(shared, job)
        from deploypipe.pipeline import help_search
        from deploypipe.user_pipeline import load_pipeline

        loaded, recipe, target = load_pipeline(job.pipeline, job.constants), job.recipe, job.target
        require_harmless_options(target)
        model, splits = loaded.build_model(), loaded.load_data()
        with shown_stages() as notify:
            found = help_search(
                model,
                splits,
                loaded.task(),
                recipe,
                target,
                replace(shared, stages=job.stages),
                source=loaded.source,
                notify=notify,
            )
        say(f"{run}: all {len(found.trials)} trials are done")


def _require_same_code(storage: "Storage", job: SharedJob) -> None:
    """StorageError unless the files here are those that the run executes; nothing of the pipeline is run for it."""
    from deploypipe.pipeline_sources import code_hashes
    from deploypipe.user_pipeline import find_pipeline

    path = find_pipeline(job.pipeline)
    for name, here in code_hashes(path, job.constants).items():
        if job.code.get(name) != here:
            seen = f"{ascii(job.code.get(name, 'absent'))[:60]}, here {here}"
            raise StorageError(
                f"{storage.shown}: the search {storage.study!r} was begun with another {name!r} than {path} and this "
                f"machine have ({seen}), so that nothing was executed; use the same on every machine"
            )


def _wait_for_job(storage: "Storage", seconds: float) -> dict[str, Any]:
    from deploypipe.search.distributed.trial_queue import read_job

    until, is_told = time.monotonic() + seconds, False
    while (job := read_job(storage)) is None:
        if time.monotonic() > until:
            raise StorageError(
                f"{storage.shown}: no search {storage.study!r} began here within {seconds:g} s; start it by "
                f"`deploypipe run ... --storage ... --name {storage.study}`, or give the worker more time with --wait"
            )
        if not is_told:
            say(f"waiting for the search {storage.study!r} to begin", flush=True)
            is_told = True
        time.sleep(_POLL_S)
    return job
