"""The work of `deploypipe run`: one target or several, one after another or several at a time."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploypipe.cli.arguments import require_name, split_settings
from deploypipe.cli.exit_codes import EXIT_ERROR, EXIT_HOLD, say
from deploypipe.cli.loading import load_network_and_data
from deploypipe.cli.stage_display import shown_stages
from deploypipe.cli.target_processes import run_commands
from deploypipe.cli.terminal import exit_code, show_result, show_table
from deploypipe.errors import ConfigError, DeploypipeError
from deploypipe.files.json_records import override, to_plain
from deploypipe.provider_options import require_harmless_options
from deploypipe.recipe import Recipe
from deploypipe.records import reported, silent
from deploypipe.report.run_tables import overview_header, overview_rows
from deploypipe.runs.result import RunResult, load_result
from deploypipe.target import Target
from deploypipe.target_files import load_target
from deploypipe.text.masked_addresses import masked

if TYPE_CHECKING:
    from deploypipe.search.distributed.study_storage import Storage
    from deploypipe.training.ranks import Ranks
    from deploypipe.user_pipeline import UserPipeline

_SHARED = "shared"  # folder next to the targets' own


@dataclass(frozen=True)
class RunArguments:
    """The command's arguments, and the targets, pipeline and recipe they name, loaded when first needed."""

    pipeline: str
    targets: Sequence[str]
    changes: Sequence[str]  # KEY=VALUE
    out: Path | None
    storage: str | None
    name: str | None
    stages: str | None
    shared: Path | None
    remeasure: bool
    fast_dev_run: bool = False
    ship_trial: int | None = None
    tensorboard: Path | None = None

    @cached_property
    def settings(self) -> dict[str, dict[str, str]]:
        return split_settings(self.changes)

    @cached_property
    def devices(self) -> list[Target]:
        devices = [override(load_target(name), self.settings["target"], "--set target") for name in self.targets]
        for device in devices:
            require_harmless_options(device)
        names = [device.name for device in devices]
        folders = [name.casefold() for name in names]  # as some file systems compare them
        for name, folder in zip(names, folders, strict=True) if len(names) > 1 else ():
            if folders.count(folder) > 1 or folder == _SHARED:
                is_twice = folder != _SHARED
                problem = f"{name!r} is given twice" if is_twice else f"{name!r} is the folder of the shared results"
                raise ConfigError("TARGET", "", problem, "each target's run has a folder of its name: use another name")
        return devices

    @cached_property
    def loaded(self) -> "UserPipeline":
        from deploypipe.user_pipeline import load_pipeline  # late: brings torch, which `--help` need not wait for

        return load_pipeline(self.pipeline, self.settings["pipeline"])

    @cached_property
    def recipe(self) -> Recipe:
        recipe = override(self.loaded.recipe(), self.settings["recipe"])
        return replace(recipe, fast_dev_run=True) if self.fast_dev_run else recipe

    def check_targets(self) -> None:
        """Raise the first error of the targets, for which no network has to be loaded."""
        devices = self.devices
        if self.ship_trial is not None and len(devices) > 1:
            remedy = "give one target, with the --out and --shared of its run"
            raise ConfigError("--ship-trial", "", "is about the search of one target, and several are given", remedy)

    def check(self) -> None:
        """Raise the first error of targets, pipeline or recipe."""
        _ = self.devices, self.loaded, self.recipe

    @property
    def folder(self) -> Path:
        """The folder of the run, or of several targets' runs."""
        [*others, last] = self.devices
        name = self.loaded.name if others else f"{self.loaded.name}-{last.name}"
        return self.out or Path("runs") / (f"{name}-fast-dev-run" if self.recipe.fast_dev_run else name)

    def folder_of(self, device: Target) -> Path:
        return self.folder / device.name if len(self.devices) > 1 else self.folder

    @property
    def shared_folder(self) -> Path | None:
        return self.shared or (self.folder / _SHARED if len(self.devices) > 1 else None)

    def study_of(self, device: Target) -> str:
        if self.name and len(self.devices) > 1:
            return f"{self.name}-{device.name}"
        return self.name or self.folder_of(device).name

    def storage_of(self, device: Target) -> "Storage | None":
        from deploypipe.pipeline_sources import code_hashes
        from deploypipe.search.distributed.study_storage import Storage

        if not self.storage:
            return None
        require_name(self.study_of(device), "--name", "the search's name")
        stages = self.stages or str(self.folder_of(device).resolve())
        job: dict[str, Any] = {
            "pipeline": self.pipeline,
            "constants": self.settings["pipeline"],
            "recipe": to_plain(self.recipe),
            "target": to_plain(device),
            "stages": stages,
            "code": code_hashes(self.loaded.path, self.settings["pipeline"]),
        }
        return Storage(url=self.storage, study=self.study_of(device), stages=stages, job=job)

    def command_for(self, target: str, device: Target) -> list[str]:
        """The arguments of `deploypipe` that run one of several targets."""
        command = ["run", self.pipeline, target, f"--out={self.folder_of(device)}", f"--shared={self.shared_folder}"]
        command += [f"--set={change}" for change in self.changes]
        if self.storage:
            command += [f"--storage={self.storage}", f"--name={self.study_of(device)}"]
        command += [f"--stages={self.stages}"] if self.stages else []
        command += ["--fast-dev-run"] if self.fast_dev_run else []
        command += [f"--tensorboard={self.tensorboard}"] if self.tensorboard else []
        return command + (["--remeasure"] if self.remeasure else [])

    def shown_command(self, device: Target) -> str:
        """The command that runs one target again, without passwords."""
        target = self.targets[self.devices.index(device)]
        command = ["deploypipe", "run", self.pipeline, target]
        if self.out or len(self.devices) > 1:
            command.append(f"--out={self.folder_of(device)}")
        if self.shared_folder:
            command.append(f"--shared={self.shared_folder}")
        for change in self.changes:
            key, shown = change.partition("=")[0], masked(change)  # a pipeline's constants may be addresses or tokens
            command.append(f"--set={shown if shown.startswith(key) else f'{key}={shown}'}")
        command += ["--fast-dev-run"] if self.fast_dev_run else []
        command += [] if self.ship_trial is None else [f"--ship-trial={self.ship_trial}"]
        if self.storage:
            command += [f"--storage={masked(self.storage)}", f"--name={self.study_of(device)}"]
        return shlex.join(command + ([f"--stages={masked(self.stages)}"] if self.stages else []))


def run_in_turn(asked: RunArguments, ranks: "Ranks") -> int:
    """Run one target after another; return the worst exit code."""
    from deploypipe.pipeline import compress
    from deploypipe.stages.fast_dev_run import first_batches
    from deploypipe.stages.ship_trial import trial_folder
    from deploypipe.training.multi_rank_finetune import agree, dismiss, serve

    with ranks.in_turn(), shown_stages() if ranks.is_first else nullcontext(silent) as notify:
        with reported(notify, "load_pipeline"):
            devices, loaded, recipe = asked.devices, asked.loaded, asked.recipe
            task = loaded.task()
        model, splits = load_network_and_data(loaded, notify)
    if recipe.fast_dev_run:
        splits = first_batches(splits)
    agree(ranks, model, splits, loaded.source)
    if not ranks.is_first:
        serve(ranks, model, splits, task)
        return 0

    def compress_for(device: Target) -> RunResult:
        folder, number = asked.folder_of(device), asked.ship_trial
        with shown_stages() as notify:
            result = compress(
                model,
                splits,
                task,
                recipe,
                device,
                folder,
                source=loaded.source,
                name=loaded.name,
                shared=asked.shared_folder,
                storage=None if number is not None else asked.storage_of(device),
                notify=notify,
                ranks=ranks,
                remeasure=asked.remeasure,
                command=asked.shown_command(device),
                ship_trial=number,
                tensorboard=asked.tensorboard,
            )
        show_result(result, folder if number is None else trial_folder(folder, number))
        return result

    code = _run_for_all(compress_for, asked) if len(devices) > 1 else exit_code(compress_for(devices[0]).decision)
    dismiss(ranks)
    return code


def _run_for_all(compress_for: Callable[[Target], RunResult], asked: RunArguments) -> int:
    """Run all targets, also after one that fails."""
    results: dict[str, RunResult | str] = {}
    for number, device in enumerate(asked.devices, start=1):
        say("")
        say(f"{device.name} ({number} of {len(asked.devices)})", flush=True)
        try:
            results[device.name] = compress_for(device)
        except DeploypipeError as error:
            say(f"error: {error}", file=sys.stderr, flush=True)
            results[device.name] = str(error)
    return _show_overview(results, asked)


def run_at_once(asked: RunArguments, jobs: int, ranks: "Ranks") -> int:
    """Run up to `jobs` targets at a time; return the worst exit code."""
    if ranks.count > 1:
        raise ConfigError("--jobs", "", "does not work with torchrun, which starts processes too", "use one of the two")
    asked.check()  # once here, so that not every target's process reports the same error
    from torch import get_num_threads

    names = [device.name for device in asked.devices]
    commands = [asked.command_for(name, device) for name, device in zip(asked.targets, asked.devices, strict=True)]
    at_once = min(jobs, len(names))
    codes = run_commands(dict(zip(names, commands, strict=True)), at_once, max(1, get_num_threads() // at_once))
    results: dict[str, RunResult | str] = {}
    for device in asked.devices:
        code = codes[device.name]
        if code in (0, EXIT_HOLD):
            results[device.name] = load_result(asked.folder_of(device))
        else:
            results[device.name] = f"ended with exit code {code}" if code > 0 else f"killed by signal {-code}"
    return _show_overview(results, asked)


def _show_overview(results: Mapping[str, RunResult | str], asked: RunArguments) -> int:
    """Show a table and write a page of all targets; return the worst exit code."""
    show_table(f"{asked.loaded.name}, target by target", overview_header(), overview_rows(results))
    from deploypipe.report.html import write_overview

    page = asked.folder / "report.html"
    try:
        write_overview(asked.loaded.name, results, page)
        say(f"report  {page}")
    except DeploypipeError as error:  # the packages for it are not installed
        say(f"report  none: {error}")
    return max(EXIT_ERROR if isinstance(result, str) else exit_code(result.decision) for result in results.values())
