"""`deploypipe run --jobs`: real runs for two of three targets at a time."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from warm_python import Child, start

from deploypipe.runs.result import RunResult, load_result

QUICK = ("search.num_trials=2", "search.num_finalists=1", "finetune.num_epochs=1", "search.num_levels=3")
PIPELINE = "from tiny_pipeline import *\nprint(torch.get_num_threads(), 'thread')\n"
NAMES = ("half", "most", "never")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipe.py").write_text(PIPELINE, encoding="utf-8")
    for name, macs in zip(NAMES, ("0.5x", "0.8x", "0.0001x"), strict=True):
        text = (
            f'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "{macs}"\naccuracy_drop_pp = 20.0\n'
        )
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, out: str, *arguments: str, num_threads: int = 1) -> Child:
    settings = [part for setting in QUICK for part in ("--set", setting)]
    targets = [f"./{name}.toml" for name in NAMES]
    return start(
        folder,
        "-m",
        "deploypipe",
        "run",
        "./pipe.py",
        *targets,
        "--out",
        out,
        *settings,
        *arguments,
        num_threads=num_threads,
    )


def choice(result: RunResult) -> object:
    """All that was decided, without the clock's figures."""
    assert result.search and result.training
    trials = [(t.knobs, t.plan, t.candidate.accuracy) for t in result.search.trials]
    return trials, result.search.best, result.benchmark.compressed.file.sha256


def at_work(folder: Path) -> dict[int, bytes]:
    """The processes with their working folder here, and what they were started as."""
    found: dict[int, bytes] = {}
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if entry.resolve() == folder.resolve() and (started := (entry.parent / "cmdline").read_bytes()):
                found[int(entry.parent.name)] = started
    return found


def wait_until_two_say(child: Child, text: str) -> None:
    told: set[str] = set()
    while len(told) < 2:
        line = child.stdout.readline()
        assert line, "the run is over"
        if text in line:
            told.add(line.split()[0])


@pytest.mark.slow  # eight processes, each of which loads PyTorch
def test_interrupted_or_killed_it_leaves_nobody_behind_and_ends_as_one_after_the_other(folder: Path) -> None:
    """Of three targets one cannot be reached, which does not end the others."""
    long = ("--jobs", "2", "--set", "search.num_trials=2000")  # far from over when the signal comes
    child = run(folder, "out", *long)
    wait_until_two_say(child, "trials take about")
    child.send_signal(signal.SIGINT)  # to it alone; a terminal interrupts all
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 130 and not at_work(folder)
    assert errors == "interrupted; the same command resumes\n"  # one line, however many are at work

    child = run(folder, "out", *long)
    wait_until_two_say(child, "")
    child.kill()
    child.communicate(timeout=60)
    end = time.monotonic() + 30
    while at_work(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert not at_work(folder)

    at_once = run(folder, "out", "--jobs", "2", num_threads=2)
    said, errors = at_once.communicate(timeout=300)
    assert at_once.returncode == 2
    assert [line.startswith("never  error: ") and "macs" in line for line in errors.splitlines()] == [True], errors
    table = said[said.index("target by target") :]
    assert "ended with exit code 2" in table and all(f"\n{name} " in table for name in NAMES)
    assert (folder / "out" / "report.html").is_file()
    assert all(f"{name:<5}  1 thread\n" in said for name in NAMES)  # of two, for two at a time
    for stage in ("structures", "dense_export", "observe", "score", "curves"):
        assert len(list((folder / "out" / "shared").glob(f"*-{stage}-*.json"))) == 1
    in_turn = run(folder, "in_turn")
    assert in_turn.communicate(timeout=300) and in_turn.returncode == 2
    for name in NAMES[:2]:
        assert f"{name}   observe         cached" in said
        one, other = (load_result(folder / out / name) for out in ("out", "in_turn"))
        assert choice(one) == choice(other)


def test_interrupted_at_once_it_prints_no_traceback(folder: Path) -> None:
    """As a terminal does it: all processes at a time, those among them that are still loading."""
    child = run(folder, "out", "--jobs", "2")
    while sum(b"spawn_main" in started for started in at_work(folder).values()) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    for process in at_work(folder):
        os.kill(process, signal.SIGINT)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 130 and not at_work(folder)
    assert errors.splitlines()[-1] == "interrupted; the same command resumes" and "Traceback" not in errors
