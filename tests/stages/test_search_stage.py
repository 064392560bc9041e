from dataclasses import replace
from pathlib import Path

import tiny_pipeline as tiny

from deploypipe.recipe import Recipe
from deploypipe.runs.store import open_run
from deploypipe.stages import search
from deploypipe.stages.context import prepare_run
from deploypipe.target import Target


def test_accuracies_are_those_of_one_network_data_and_repair_whatever_the_target(tmp_path: Path) -> None:
    dense, splits = tiny.build_model(), tiny.load_data()

    def folder(recipe: Recipe, target: Target, source: str = "") -> Path:
        with open_run(tmp_path) as run:
            ctx = prepare_run(dense, splits, tiny.task(), recipe, target, run, source=source)
            return search.known_accuracies(ctx).folder

    recipe, target = tiny.recipe(), tiny.target(latency_p50="0.5x")
    own = folder(recipe, target)
    assert folder(replace(recipe, finetune=replace(recipe.finetune, num_epochs=1)), target) == own
    assert folder(recipe, replace(tiny.target(macs="0.9x"), num_threads=2)) == own
    others = [
        folder(replace(recipe, seed=1), target),
        folder(replace(recipe, repair=replace(recipe.repair, ridge=0.5)), target),
        folder(replace(recipe, search=replace(recipe.search, num_repair_samples=17)), target),
        folder(recipe, target, source="changed"),
    ]
    assert own not in others and len(set(others)) == len(others)
