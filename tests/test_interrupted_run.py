"""Whole programs as children: an interrupted run, and what `init` writes."""

import signal
import sys
from pathlib import Path

import pytest
import typer
from warm_python import run, start

from deploypipe.cli.exit_codes import exit_codes
from deploypipe.cli.stage_display import shown_stages
from deploypipe.records import Finished, Started

TARGET = 'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "0.5x"\naccuracy_drop_pp = 10.0\n'


def test_control_c_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "pipe.py").write_text("from tiny_pipeline import *\n", encoding="utf-8")
    (tmp_path / "cpu.toml").write_text(TARGET, encoding="utf-8")
    long = ("--set", "search.num_trials=200", "--set", "finetune.num_epochs=200")  # not over before the signal comes
    child = start(tmp_path, "-m", "deploypipe", "run", "./pipe.py", "./cpu.toml", "--out", "out", *long)
    assert child.stdout
    while not (line := child.stdout.readline()).startswith("structures"):
        assert line, "the run is over"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=300)
    assert (child.returncode, said.strip()) == (130, "interrupted; the same command resumes")
    assert not (tmp_path / "out" / "result.json").exists()


def test_an_error_that_a_library_raises_for_an_interrupt_ends_like_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, exit_codes():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("the session was closed in the middle of a flush")  # noqa: B904  # as libraries do
    assert left.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes\n"


def test_what_init_writes_runs_as_it_is(tmp_path: Path) -> None:
    assert run(tmp_path, "-m", "deploypipe", "init", "mine").returncode == 0
    quick = ("pipeline.NUM_STEPS=40", "observe.num_samples=128", "search.num_trials=2", "search.num_levels=3")
    flags = [part for setting in (*quick, "finetune.num_epochs=1") for part in ("--set", setting)]
    done = run(tmp_path, "-m", "deploypipe", "run", "mine", "mine", *flags)
    assert done.returncode in (0, 1), done.stderr  # HOLD on a machine too busy to be steady
    assert "runs/mine-mine/model.onnx" in done.stdout and (tmp_path / "runs" / "mine-mine" / "model.onnx").is_file()


class Interrupting:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class Faulty:
    def __del__(self) -> None:
        raise ValueError


def test_an_interrupt_that_python_swallowed_is_raised_at_the_next_event(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), shown_stages() as notify:
            notify(Started(stage="search"))
            Interrupting()  # is gone at once
            Faulty()
            notify(Finished(stage="search"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert told == [ValueError]
    finally:
        signal.signal(signal.SIGINT, before)
