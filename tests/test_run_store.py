import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import warm_python
from finished_runs import finished_run
from runs_side_by_side import start_measuring

from deploypipe.errors import RunFolderError
from deploypipe.files.atomic import place_file, write_atomically
from deploypipe.records import Cached, Event, Finished, Interval, Note, Progress, Started, Warned
from deploypipe.runs import store
from deploypipe.runs.result import load_plan, load_result, save_result
from deploypipe.runs.store import open_run

RECORD = Interval(value=1.0, low=0.5, high=1.5)
COMPUTED = [Started(stage="score"), Finished(stage="score")]
READ = [Started(stage="score"), Cached(stage="score")]


class Work:
    """A stage that counts how often it is computed, and leaves one file."""

    def __init__(self, record: Interval = RECORD) -> None:
        self.record, self.num_calls = record, 0

    def __call__(self, folder: Path) -> Interval:
        self.num_calls += 1
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "weights.bin").write_bytes(b"weights")
        return self.record


def once(path: Path, work: Callable[[Path], Interval], **inputs: object) -> tuple[Interval, list[Event], Path]:
    """Open the run, do one stage, close: its record, the events, its files."""
    events: list[Event] = []
    with open_run(path, events.append) as run:
        done = run.remember("score", inputs, work, Interval)
        assert run.times[0].was_cached is (Cached(stage="score") in events)
        return done.record, events, done.files


def test_a_finished_stage_is_read_not_computed(tmp_path: Path) -> None:
    work = Work()
    first, events, files = once(tmp_path, work, seed=1)
    assert first == RECORD and events == COMPUTED and (files / "sub" / "weights.bin").is_file()
    second, events, again = once(tmp_path, work, seed=1)
    assert second == RECORD and events == READ and again == files and work.num_calls == 1


def test_a_record_that_is_not_final_is_computed_again_by_the_next_run(tmp_path: Path) -> None:
    def measure(work: Work, *, remeasure: bool = False) -> list[float]:
        """Twice in one run."""
        with open_run(tmp_path) as run:
            run.remeasure = remeasure
            return [
                run.remember(
                    "benchmark", {"file": 1}, work, Interval, is_final=lambda found: found.value > 0
                ).record.value
                for _ in range(2)
            ]

    shaky, steady = Work(replace(RECORD, value=-1.0)), Work(replace(RECORD, value=2.0))
    assert measure(shaky) == [-1.0, -1.0] and shaky.num_calls == 1  # once a run
    assert measure(steady) == [2.0, 2.0] and steady.num_calls == 1
    assert measure(steady) == [2.0, 2.0] and steady.num_calls == 1  # it is final now
    assert measure(Work(replace(RECORD, value=3.0)), remeasure=True) == [3.0, 3.0]
    assert measure(steady) == [3.0, 3.0] and steady.num_calls == 1


def test_other_inputs_are_another_stage(tmp_path: Path) -> None:
    work = Work()
    places = {once(tmp_path, work, seed=seed, recipe=finished_run().recipe)[2] for seed in (1, 2)}
    assert work.num_calls == 2 and len(places) == 2
    once(tmp_path, work, seed=1, recipe=finished_run().recipe)
    assert work.num_calls == 2  # the first is still there


def _tamper_record(path: Path) -> None:
    text = path.read_text()
    assert '"value": 1.0' in text
    path.write_text(text.replace('"value": 1.0', '"value": 2.0'))


def _forget_file(path: Path) -> None:
    stored = json.loads(path.read_text())
    stored["files"].clear()
    path.write_text(json.dumps(stored))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "record cut short": lambda record, files: record.write_bytes(record.read_bytes()[:-20]),
    "record empty": lambda record, files: record.write_bytes(b""),
    "record not ours": lambda record, files: record.write_bytes(b"[1]"),
    "record changed": lambda record, files: _tamper_record(record),
    "a file no longer named": lambda record, files: _forget_file(record),
    "file changed": lambda record, files: (files / "sub" / "weights.bin").write_bytes(b"weightz"),
    "file gone": lambda record, files: (files / "sub" / "weights.bin").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_computed_again_loudly(damage: str, tmp_path: Path) -> None:
    work = Work()
    files = once(tmp_path, work, seed=1)[2]
    DAMAGES[damage](files.with_name(f"{files.name}.json"), files)
    record, events, files = once(tmp_path, work, seed=1)
    assert record == RECORD and work.num_calls == 2
    assert any(isinstance(event, Warned) and "score" in event.text for event in events)
    assert (files / "sub" / "weights.bin").read_bytes() == b"weights"
    assert once(tmp_path, work, seed=1)[1] == READ


def test_records_that_changed_places_are_computed_again(tmp_path: Path) -> None:
    """Each is whole, and lies under the name of another stage, or of the same stage for other inputs."""
    stages = (("score", 1, RECORD), ("score", 2, Interval(value=2.0, low=2.0, high=2.0)))
    stages += (("curves", 1, Interval(value=3.0, low=3.0, high=3.0)),)

    def run_all() -> list[tuple[Interval, bool]]:
        with open_run(tmp_path) as run:
            done = [run.remember(name, {"seed": seed}, Work(record), Interval) for name, seed, record in stages]
            return [
                (record, time.was_cached)
                for record, time in zip([each.record for each in done], run.times, strict=True)
            ]

    expected = [record for *_, record in stages]
    assert run_all() == [(record, False) for record in expected]
    records = sorted(tmp_path.glob("*.json"))
    contents = [path.read_bytes() for path in records]
    for path, content in zip(records, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    assert run_all() == [(record, False) for record in expected]
    assert run_all() == [(record, True) for record in expected]


def test_a_failure_is_not_kept_but_its_checkpoint_is(tmp_path: Path) -> None:
    seen: list[bool] = []

    def fail_once(folder: Path) -> Interval:
        seen.append((folder / "checkpoint").is_file())
        (folder / "checkpoint").write_bytes(b"half")
        if len(seen) == 1:
            raise RuntimeError("lost power")
        return RECORD

    with pytest.raises(RuntimeError, match="lost power"):
        once(tmp_path, fail_once, seed=1)
    assert not list(tmp_path.glob("*.json"))
    assert once(tmp_path, fail_once, seed=1)[0] == RECORD
    assert seen == [False, True]


def test_a_kill_between_the_two_renames_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are in place, the record is not: what stands there is not trusted."""
    work = Work()

    def killed(path: Path, content: bytes) -> None:
        path.with_name(f".{path.name}.part").write_bytes(content[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            once(tmp_path, work, seed=1)
    (stale,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    (stale / "stale.bin").write_bytes(b"stale")
    record, _, files = once(tmp_path, work, seed=1)
    assert record == RECORD and work.num_calls == 2 and not (files / "stale.bin").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_half_written_files_of_a_killed_run_go(tmp_path: Path) -> None:
    (tmp_path / "accuracies-0").mkdir()
    for name in (
        ".study-17.db.4711.part",
        ".study-17.db.4711.part-journal",
        ".result.json.part",
        ".gitignore",
        "accuracies-0/.plan.json.part",
    ):
        (tmp_path / name).write_text("half")
    with open_run(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".gitignore", "accuracies-0", "run.lock"]


def test_of_runs_side_by_side_one_computes_a_stage_and_the_other_finds_it(tmp_path: Path) -> None:
    begun, num_calls, told = threading.Event(), [], list[tuple[str, Event]]()

    def work(folder: Path) -> Interval:
        num_calls.append(1)
        begun.set()
        time.sleep(0.5)
        return RECORD

    def run_beside(name: str) -> Interval:
        if name == "second":
            begun.wait(30)
        with open_run(tmp_path / name, lambda event: told.append((name, event)), tmp_path / "shared") as run:
            return run.remember("score", {}, work, Interval, is_shared=True).record

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run_beside, ("first", "second"))) == [RECORD, RECORD]
    assert len(num_calls) == 1
    assert [event for name, event in told if name == "second"] == [
        Started(stage="score"),
        Note(stage="score", text="waits for another run, which is at it"),
        Cached(stage="score"),
    ]


def test_a_run_lets_others_measure_where_a_stage_begins_and_nowhere_else(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", shared=tmp_path / "shared") as run:
        measured = start_measuring(tmp_path / "shared")
        for _ in range(5):
            run.notify(Progress(stage="finetune", done=1, total=2))
            assert not measured.wait(0.1)
        for seed in range(100):
            run.remember("score", {"seed": seed}, Work(), Interval)
            if measured.wait(0.1):
                break
        assert measured.is_set()


def test_what_others_have_in_the_making_stays(tmp_path: Path) -> None:
    part = tmp_path / "shared" / ".plan.json.4711.part"
    with open_run(tmp_path / "first", shared=tmp_path / "shared"):
        part.write_text("half")
        with open_run(tmp_path / "second", shared=tmp_path / "shared"):
            pass
    assert part.exists()
    with open_run(tmp_path / "first", shared=tmp_path / "shared"):
        assert not part.exists()


def test_a_file_placed_twice_leaves_no_other_name(tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    for content in (b"first", b"other"):
        source.write_bytes(content)
        place_file(source, there)
        place_file(source, there)
        assert there.read_bytes() == content
        assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}


def test_a_second_run_in_the_folder_is_refused_and_the_lock_is_given_back(tmp_path: Path) -> None:
    attempt = "from pathlib import Path; from deploypipe.runs.store import open_run\nwith open_run(Path('run')): pass"
    (tmp_path / "attempt.py").write_text(attempt, encoding="utf-8")
    folder = tmp_path / "run"
    with open_run(folder):
        refused = warm_python.run(tmp_path, "attempt.py")
        with pytest.raises(RunFolderError, match="another run is at work here"), open_run(folder):
            pass
    assert refused.returncode and "another run is at work here" in refused.stderr
    assert warm_python.run(tmp_path, "attempt.py").returncode == 0


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot be written.*--out"), open_run(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_rights_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot be written"), open_run(tmp_path / "run"):
        pass


def test_result_comes_back_and_its_absence_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"result\.json is absent"):
        load_result(tmp_path)
    save_result(tmp_path, finished_run())
    assert load_result(tmp_path) == finished_run()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("edit", [("SHIP", "HOLD"), ("0.2", "0.3"), (" ", ""), ("\n", "")])
def test_an_edited_result_is_an_error_that_names_the_remedy(edit: tuple[str, str], tmp_path: Path) -> None:
    save_result(tmp_path, finished_run())
    path = tmp_path / "result.json"
    assert edit[0] in path.read_text()
    path.write_text(edit[1].join(path.read_text().rsplit(edit[0], 1)))
    with pytest.raises(RunFolderError, match=r"result\.json: .*content_sha256.*; run the same command again"):
        load_result(tmp_path)


def test_events_carry_the_stage(tmp_path: Path) -> None:
    events: list[Event] = []
    with open_run(tmp_path, events.append) as run:
        scores = run.remember("score", {}, Work(), Interval)
        found = run.remember("search", {"score": scores.key}, Work(), Interval)
        assert found.files.name.startswith("02-search-") and scores.files.name.endswith(scores.key)
    assert events[::2] == [Started(stage="score"), Started(stage="search")]


def test_a_device_or_a_stream_is_written_to_and_stays(tmp_path: Path) -> None:
    """`--markdown /dev/stdout`, as root in a CI job, made a file of it."""
    reading, writing = os.pipe()
    try:
        write_atomically(Path(f"/dev/fd/{writing}"), b"said")
        assert os.read(reading, 100) == b"said"
    finally:
        os.close(reading)
        os.close(writing)
    _, terminal = os.openpty()  # a device that is nobody's loss
    write_atomically(Path(os.ttyname(terminal)), b"said")
    assert Path(os.ttyname(terminal)).is_char_device()
    os.close(terminal)


def test_a_plan_is_a_file_of_sensible_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_bytes(b" " * 2000)
    monkeypatch.setattr("deploypipe.plan_file._MAX_BYTES", 1000)
    with pytest.raises(RunFolderError, match="more than 1,000 bytes"):
        load_plan(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(RunFolderError, match="is not a file"):
            load_plan(path)
