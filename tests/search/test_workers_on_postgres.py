"""Many workers end with the same trials as one, on a real PostgreSQL that is killed, paused and restarted."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import warm_python
from made_up_searches import Evaluator, run

from deploypipe.files.json_records import from_json, to_json
from deploypipe.recipe import Search
from deploypipe.records import SearchResult
from deploypipe.search.distributed.study_storage import Storage

pgserver = pytest.importorskip("pgserver", reason="a PostgreSQL of the tests' own needs pgserver")

WORKER = Path(__file__).parents[1] / "search_worker.py"
SETTINGS = Search(num_trials=14, num_parallel=4)


class Database:
    """A server with one database, which can be restarted."""

    def __init__(self, folder: Path) -> None:
        self._server = pgserver.get_server(folder, cleanup_mode="stop")
        self.address = self._server.get_uri()

    def restart(self, seconds: float) -> None:
        from pgserver.postgres_server import pg_ctl

        where = {"pgdata": self._server.pgdata, "user": self._server.system_user}
        pg_ctl(["-m", "immediate", "stop"], **where)
        time.sleep(seconds)
        self._server.ensure_postgres_running()

    def stop(self) -> None:
        self._server.cleanup()


@pytest.fixture
def database() -> Iterator[Database]:
    with TemporaryDirectory() as folder:  # the server is another user where root tests, and may not enter pytest's own
        made = Database(Path(folder))
        yield made
        made.stop()


@pytest.fixture(params=["postgresql", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.db"
    return str(request.getfixturevalue("database").address)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one worker finds, on a file of its own."""
    return told(run(Evaluator(), tmp_path_factory.mktemp("alone") / "study.db", settings=SETTINGS))


def told(result: SearchResult) -> str:
    """All of it but who did what."""
    return to_json(replace(result, trials=tuple(replace(trial, evaluated_by="") for trial in result.trials)))


class Worker:
    def __init__(self, address: str, log: Path, seconds: float) -> None:
        self.log = log
        log.touch()
        arguments = [address, str(SETTINGS.num_trials), str(SETTINGS.num_parallel), str(seconds), str(log)]
        self.process = warm_python.start(log.parent, str(WORKER), *arguments)

    def wait_until(self, line: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while line not in self.log.read_text().splitlines():
            assert self.process.poll() is None, self.process.communicate(60)[1]
            assert time.monotonic() < until, f"{line!r} is not in {self.log.read_text()!r}"
            time.sleep(0.02)

    def found(self) -> str:
        _, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return told(from_json(SearchResult, Path(f"{self.log}.json").read_bytes(), "the worker"))

    def judged(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if not line.startswith("began")]


Start = Callable[[str, int, float], list[Worker]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """(address, count, seconds of a trial) -> workers, none of which outlives the test."""
    started: list[Worker] = []

    def workers(address: str, count: int, seconds: float) -> list[Worker]:
        team = [Worker(address, tmp_path / f"{number}.log", seconds) for number in range(count)]
        started.extend(team)
        return team

    yield workers
    for worker in started:
        worker.process.kill()
        worker.process.communicate(60)


def test_three_workers_end_like_one_and_evaluate_no_plan_twice(address: str, alone: str, start: Start) -> None:
    team = start(address, 3, 0.3)
    assert [worker.found() for worker in team] == [alone] * 3
    judged = Counter(plan for worker in team for plan in worker.judged())
    assert set(judged.values()) == {1}
    assert all(worker.judged() for worker in team)


@pytest.mark.slow
def test_a_worker_killed_one_stopped_and_the_database_restarted(database: Database, alone: str, start: Start) -> None:
    killed, stopped, steady = team = start(database.address, 3, 1.0)
    for worker in team:
        worker.wait_until("began 1")
    killed.process.send_signal(signal.SIGKILL)
    stopped.process.send_signal(signal.SIGSTOP)
    database.restart(seconds=1)
    time.sleep(8)  # past the grace of four seconds: the others take its trial over
    stopped.process.send_signal(signal.SIGCONT)
    assert [stopped.found(), steady.found()] == [alone] * 2
    judged = Counter(plan for worker in (stopped, steady) for plan in worker.judged())
    assert sum(judged.values()) - len(judged) <= 1  # what was finished by a worker that had stood still


def test_more_trials_continue_the_finished_ones(address: str, alone: str, tmp_path: Path) -> None:
    storage = Storage(url=address, study="growing")
    few = run(Evaluator(), storage, settings=Search(num_trials=9, num_parallel=4))
    rest = Evaluator()
    assert told(run(rest, storage, settings=SETTINGS)) == alone
    assert len(rest.seen) <= 14 - 9 and len(few.trials) == 9
