from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploypipe.records import PruningPlan
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache

PLAN = PruningPlan(model_fingerprint="f", cuts=(), edits=(), blocks=("layer1.0",))
RESULTS = np.random.default_rng(0).random(1000).round()


def test_stored_results_are_returned_and_the_longer_ones_kept(tmp_path: Path) -> None:
    accuracies = AccuracyCache(tmp_path / "accuracies")
    assert len(accuracies.of(PLAN)) == 0
    for results, known in ((RESULTS[:500], 500), (RESULTS, 1000), (RESULTS[:500], 1000)):
        accuracies.keep(PLAN, results)
        np.testing.assert_array_equal(AccuracyCache(tmp_path / "accuracies").of(PLAN), RESULTS[:known])
    assert len(accuracies.of(replace(PLAN, blocks=("layer1.1",)))) == 0


def test_the_file_of_another_network_is_ignored(tmp_path: Path) -> None:
    accuracies = AccuracyCache(tmp_path)
    other = replace(PLAN, blocks=("layer1.1",))
    accuracies.keep(PLAN, RESULTS)
    (file,) = tmp_path.iterdir()
    accuracies.keep(other, RESULTS[:500])
    (twin,) = set(tmp_path.iterdir()) - {file}
    twin.write_bytes(file.read_bytes())
    assert len(accuracies.of(other)) == 0 and len(accuracies.of(PLAN)) == 1000


@pytest.mark.parametrize("content", ["", "[]", '{"results": "bits 1 zz", "sha256": ""}', "{}"])
def test_a_damaged_file_is_ignored(tmp_path: Path, content: str) -> None:
    accuracies = AccuracyCache(tmp_path)
    accuracies.keep(PLAN, RESULTS)
    (file,) = tmp_path.iterdir()
    file.write_text(content or file.read_text().replace(" 1000 ", " 1001 "), encoding="utf-8")
    assert len(accuracies.of(PLAN)) == 0
    accuracies.keep(PLAN, RESULTS)
    np.testing.assert_array_equal(accuracies.of(PLAN), RESULTS)
