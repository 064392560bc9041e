"""One worker of a search over made-up networks. python search_worker.py ADDRESS TRIALS PARALLEL SECONDS LOG [STUDY]

Writes "began NUMBER_OF_ITS_CALL" and "PLAN" lines to LOG, and the result's JSON to LOG.json.
"""

import sys
import time
from pathlib import Path

from made_up_searches import Evaluator, run

from deploypipe.files.json_records import to_json
from deploypipe.recipe import Search
from deploypipe.search.distributed.study_storage import Storage


class Slow(Evaluator):
    """Evaluates slowly, and logs what it evaluated."""

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__(before=self._begin)
        self._seconds, self._log = seconds, log

    def _begin(self, call: int) -> None:
        with self._log.open("a") as log:
            log.write(f"began {call}\n")
        time.sleep(self._seconds)

    def __call__(self, plan, is_settled):  # type: ignore[no-untyped-def]
        judged = super().__call__(plan, is_settled)
        with self._log.open("a") as log:
            log.write(f"{plan.edits[0].removed}\n")
        return judged


def main(address: str, num_trials: str, num_parallel: str, seconds: str, log: str, study: str = "made-up") -> None:
    storage = Storage(url=address, study=study, heartbeat_s=1, grace_s=4, patience_s=60.0)
    settings = Search(num_trials=int(num_trials), num_parallel=int(num_parallel))
    found = run(Slow(float(seconds), Path(log)), storage, settings=settings)
    Path(f"{log}.json").write_text(to_json(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
