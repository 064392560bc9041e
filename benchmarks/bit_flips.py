"""Flip single bits in the files of a run, one at a time, and count how many of the flips are detected.

    python benchmarks/bit_flips.py RUN [--flips 600] [--seed 0] [--rerun 'deploypipe run ...' --reruns 5]

RUN is the folder of a finished run that ships; the benchmark works on a copy. A flip is detected if a command refuses
the file, or if a rerun would compute the stage again (`read_record` reports damage). A crash does not count as
detected. With --rerun, the given command (`{run}` stands for the folder) runs after flips in stages: its plan must not
change.
"""

import argparse
import random
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.files.json_records import to_json
from deploypipe.release.bundle import MODEL, make_bundle
from deploypipe.runs.result import RESULT, load_result
from deploypipe.runs.store import read_record
from deploypipe.text.sealed_json import unseal

RERUN = "rerun"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Files of one kind and their checks. Each check returns whether it detects a changed file."""

    name: str
    files: tuple[Path, ...]
    checks: Mapping[str, Callable[[Path], bool]]


@dataclass(slots=True)
class Row:
    """The outcome of the flips in a group."""

    name: str
    flips: int = 0
    caught_by: Counter[str] = field(default_factory=Counter)
    through: list[str] = field(default_factory=list)  # places where no check detected the flip


def groups_of(run: Path, bundle: Path, device: Path) -> list[Group]:
    """The groups of files in a run, in its bundle, and in the golden folder alone, as it is copied to a device."""
    commands = {
        "release": _command("release", run, "--out", str(run.parent / "bundles")),
        "verify": _command("verify", run),
    }
    records = [path for path in sorted(run.glob("[0-9][0-9]-*.json")) if path.with_suffix("").is_dir()]
    stage_files = [path for record in records for path in _files_in(record.with_suffix(""))]
    accuracies = tuple(sorted(run.glob("accuracies-*/*.json")))
    return [
        Group(name=RESULT, files=(run / RESULT,), checks=commands),
        Group(name="stage records", files=tuple(records), checks={RERUN: partial(_is_computed_again, run)}),
        Group(name="stage files", files=tuple(stage_files), checks={RERUN: partial(_is_computed_again, run)}),
        *([Group(name="kept accuracies", files=accuracies, checks={RERUN: _is_unsealed})] if accuracies else []),
        *(Group(name=name, files=(run / name,), checks=commands) for name in sorted(_golden_names(run))),
        Group(name="bundle", files=tuple(_files_in(bundle)), checks={"verify": _command("verify", bundle)}),
        Group(
            name="golden folder alone", files=tuple(_files_in(device)), checks={"verify": _command("verify", device)}
        ),
    ]


def flip_and_check(groups: Sequence[Group], num_flips: int, seed: int) -> list[Row]:
    """Flip `num_flips` bits, equally many in each group, in files drawn at random. Every file is restored."""
    rng = random.Random(seed)
    rows = []
    for number, group in enumerate(groups):
        row = Row(name=group.name)
        count = num_flips // len(groups) + (number < num_flips % len(groups))
        for _ in range(count):
            path = rng.choice([path for path in group.files if path.stat().st_size])
            place = (rng.randrange(path.stat().st_size), rng.randrange(8))
            before = path.read_bytes()
            _write_flipped(path, before, *place)
            try:
                noticed = [name for name, check in group.checks.items() if check(path)]
            finally:
                path.write_bytes(before)
            row.flips += 1
            row.caught_by.update(noticed)
            if not noticed:
                row.through.append(f"{path.name}, byte {place[0]}, bit {place[1]}")
        rows.append(row)
    return rows


def _write_flipped(path: Path, content: bytes, place: int, bit: int) -> None:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.unlink()  # names in a run folder may be links to one file
    path.write_bytes(changed)


def _command(name: str, folder: Path, *options: str) -> Callable[[Path], bool]:
    def is_refused(_: Path) -> bool:
        done = CliRunner().invoke(app, [name, str(folder), *options])
        if "this is a bug" in done.output or not isinstance(done.exception, SystemExit | None):
            raise RuntimeError(f"`deploypipe {name} {folder}` crashed: {done.output}")
        return done.exit_code != 0

    return is_refused


def _is_computed_again(run: Path, path: Path) -> bool:
    at = run / path.relative_to(run).parts[0].removesuffix(".json")
    return read_record(at, at.name.partition("-")[2]) is None


def _is_unsealed(path: Path) -> bool:
    try:
        unseal(path.read_bytes())
    except ValueError:
        return True
    return False


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _golden_names(run: Path) -> list[str]:
    golden = load_result(run).golden
    return [entry.name for entry in golden.files] if golden else [MODEL]


def rerun(run: Path, command: str, num_flips: int, seed: int) -> int:
    """Flip a bit in a stage and run again, `num_flips` times; count how often the plan stays the same."""
    rng = random.Random(seed)
    plan = _plan(run)
    same = 0
    for _ in range(num_flips):
        path = rng.choice(
            [path for group in groups_of(run, run, run)[1:3] for path in group.files if path.stat().st_size]
        )
        content = path.read_bytes()
        _write_flipped(path, content, rng.randrange(len(content)), rng.randrange(8))
        done = subprocess.run(shlex.split(command.format(run=run)), capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the rerun after a flip in {path} failed: {done.stdout}{done.stderr}")
        is_told = "is damaged; computing it again" in " ".join((done.stdout + done.stderr).split())
        same += is_told and _plan(run) == plan
    return same


def _plan(run: Path) -> str:
    search = load_result(run).search
    return to_json(search.trials[search.best].plan) if search else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--flips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rerun", default="")
    parser.add_argument("--reruns", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        run, device = Path(scratch) / "run", Path(scratch) / "device"
        shutil.copytree(options.run, run)
        bundle = make_bundle(run, Path(scratch) / "released")
        device.mkdir()
        for name in _golden_names(run):
            shutil.copyfile(run / name, device / name)
        print("| where | flips | caught by | went through |\n|---|---:|---|---:|")
        rows = flip_and_check(groups_of(run, bundle, device), options.flips, options.seed)
        for row in rows:
            caught = ", ".join(f"{name} {count}" for name, count in sorted(row.caught_by.items()))
            print(f"| {row.name} | {row.flips} | {caught} | {len(row.through)} |")
        print(f"| all | {sum(row.flips for row in rows)} | | {sum(len(row.through) for row in rows)} |")
        for row in rows:
            for place in row.through:
                print(f"went through: {row.name}: {place}")
        if options.rerun:
            same = rerun(run, options.rerun, options.reruns, options.seed)
            print(f"real reruns after a flip: {same} of {options.reruns} said so and found the same plan")


if __name__ == "__main__":
    main()
