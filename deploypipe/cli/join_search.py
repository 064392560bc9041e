"""The work of `deploypipe worker`: find a search that another process runs, and do trials of it."""

import time
from dataclasses import dataclass, replace
from typing import Any

from deploypipe.cli.arguments import require_name
from deploypipe.cli.exit_codes import say
from deploypipe.cli.terminal import shown_stages
from deploypipe.errors import StorageError
from deploypipe.files.json_records import from_plain
from deploypipe.pipeline import help_search
from deploypipe.pipeline_sources import code_hashes
from deploypipe.provider_options import require_harmless_options
from deploypipe.recipe import Recipe
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import read_job
from deploypipe.target import Target
from deploypipe.user_pipeline import find_pipeline, load_pipeline

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


def join_search(run: str, address: str, wait: float) -> None:
    """Do trials of the search `run` in the database at `address` until all are done. Wait `wait` seconds for it."""
    require_name(run, "--run", "the search's name")
    shared = Storage(url=address, study=run)
    job = from_plain(SharedJob, _wait_for_job(shared, wait), f"{shared.shown}: {run}")
    _require_same_code(shared, job)
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


def _require_same_code(storage: Storage, job: SharedJob) -> None:
    """StorageError unless the files here are those that the run executes; nothing of the pipeline is run for it."""
    path = find_pipeline(job.pipeline)
    for name, here in code_hashes(path, job.constants).items():
        if job.code.get(name) != here:
            seen = f"{ascii(job.code.get(name, 'absent'))[:60]}, here {here}"
            raise StorageError(
                f"{storage.shown}: the search {storage.study!r} was begun with another {name!r} than {path} and this "
                f"machine have ({seen}), so that nothing was executed; use the same on every machine"
            )


def _wait_for_job(storage: Storage, seconds: float) -> dict[str, Any]:
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
