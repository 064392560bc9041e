"""Cache the val results of candidates next to the stages, so that a search for another target repairs none again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploypipe.files.atomic import write_atomically
from deploypipe.records import PruningPlan
from deploypipe.search.evaluation.run_trial import network_key
from deploypipe.search.sample_results import Results, decode_results, encode_results
from deploypipe.text import strict_json
from deploypipe.text.sealed_json import seal, unseal


@dataclass(frozen=True, slots=True)
class AccuracyCache:
    """One file for each network, in a folder that belongs to one dense network, data set, repair and seed."""

    folder: Path

    def of(self, plan: PruningPlan) -> Results:
        """Return the results of the samples evaluated so far, in the order of val's parts.

        Empty if nothing is known, or if the file is damaged or belongs to another network.
        """
        try:
            stored = strict_json.loads_any_float(unseal(self._file(plan).read_bytes()))
            return decode_results(stored["results"]) if stored["network"] == network_key(plan) else np.empty(0)
        except (OSError, ValueError, KeyError, TypeError):
            return np.empty(0)

    def keep(self, plan: PruningPlan, results: Results) -> None:
        """Store the results, unless more are stored already."""
        if len(results) > len(self.of(plan)):
            self.folder.mkdir(exist_ok=True)
            content = {"network": network_key(plan), "results": encode_results(results)}
            write_atomically(self._file(plan), seal(strict_json.dumps(content)))

    def _file(self, plan: PruningPlan) -> Path:
        return self.folder / f"{network_key(plan)}.json"
