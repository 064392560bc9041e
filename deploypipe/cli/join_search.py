"""The work of `deploypipe worker`: find a search that another process runs, and run trials of it."""

import time
from dataclasses import dataclass, replace
from typing import Any

from deploypipe.cli.arguments import require_name
from deploypipe.cli.exit_codes import say
from deploypipe.cli.loading import load_network_and_data
from deploypipe.cli.stage_display import shown_stages
from deploypipe.errors import StorageError
from deploypipe.files.json_records import from_plain
from deploypipe.pipeline import help_search
from deploypipe.pipeline_sources import code_hashes
from deploypipe.provider_options import require_harmless_options
from deploypipe.recipe import Recipe
from deploypipe.records import reported
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import read_job
from deploypipe.target import Target
from deploypipe.user_pipeline import find_pipeline, load_pipeline

_POLL_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedJob:
    """The facts about a run that workers need, as stored in the database."""

    pipeline: str
    constants: dict[str, str]
    recipe: Recipe
    target: Target
    stages: str
    code: dict[str, str]  # hashes of the code that the run executes, from `pipeline_sources.code_hashes`


def join_search(run: str, address: str, wait: float) -> None:
    """Run trials of the search `run` in the database at `address` until all are done. Wait `wait` seconds for it."""
    require_name(run, "--run", "the search's name")
    shared = Storage(url=address, study=run)
    job = from_plain(SharedJob, _wait_for_job(shared, wait), f"{shared.shown}: {run}")
    _require_same_code(shared, job)
    recipe, target = job.recipe, job.target
    require_harmless_options(target)
    with shown_stages() as notify:
        with reported(notify, "load_pipeline"):
            loaded = load_pipeline(job.pipeline, job.constants)
        model, splits = load_network_and_data(loaded, notify)
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
    """Raise StorageError unless the files here equal those that the run executes. No code of the pipeline is run."""
    path = find_pipeline(job.pipeline)
    for name, here in code_hashes(path, job.constants).items():
        if job.code.get(name) != here:
            seen = f"{ascii(job.code.get(name, 'absent'))[:60]}, here {here}"
            raise StorageError(
                f"{storage.shown}: the search {storage.study!r} was started with another {name!r} than {path} and "
                f"this machine have ({seen}); nothing was executed; use the same on every machine"
            )


def _wait_for_job(storage: Storage, seconds: float) -> dict[str, Any]:
    until, is_reported = time.monotonic() + seconds, False
    while (job := read_job(storage)) is None:
        if time.monotonic() > until:
            raise StorageError(
                f"{storage.shown}: no search {storage.study!r} started here within {seconds:g} s; start it with "
                f"`deploypipe run ... --storage ... --name {storage.study}`, or wait longer with --wait"
            )
        if not is_reported:
            say(f"waiting for the search {storage.study!r} to start", flush=True)
            is_reported = True
        time.sleep(_POLL_S)
    return job
