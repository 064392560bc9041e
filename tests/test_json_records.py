import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished_run, untouched_run
from hypothesis import given, settings
from hypothesis import strategies as st

from deploypipe.budgets import BUDGETS
from deploypipe.errors import ConfigError
from deploypipe.files.json_records import from_json, from_plain, load_toml, override, to_json, to_plain
from deploypipe.recipe import Constraints, Magnitude, Mipp, Random, Recipe
from deploypipe.records import GroupCut, PruningPlan, Trial
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget, Target, parse_limit
from deploypipe.text.field_bounds import shown

ROOT = Path(__file__).parents[1]


def target_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "device.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("run", [finished_run(), untouched_run()], ids=["finished", "untouched"])
def test_a_whole_run_comes_back_equal(run: RunResult) -> None:
    assert from_json(RunResult, to_json(run), "result.json") == run
    assert from_plain(RunResult, to_plain(run), "result.json") == run


cuts = st.builds(
    GroupCut,
    group=st.text(max_size=8),
    asked=st.integers(0, 9),
    removed=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    num_units=st.integers(1, 99),
    reason=st.text(max_size=8),
)
plans = st.builds(
    PruningPlan,
    model_fingerprint=st.text(max_size=8),
    cuts=st.lists(cuts, max_size=3).map(tuple),
    edits=st.just(()),
    blocks=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(plan=plans)
def test_any_plan_comes_back_equal_and_equal_plans_give_equal_bytes(plan: PruningPlan) -> None:
    text = to_json(plan)
    again = from_json(PruningPlan, text, "plan.json")
    assert again == plan and to_json(again) == text


@settings(max_examples=60, deadline=None)
@given(
    knobs=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    number=st.integers(0, 10**9),
)
def test_floats_come_back_bit_for_bit(knobs: dict[str, float], number: int) -> None:
    plain = to_plain(finished_run().search.trials[0])  # type: ignore[union-attr]
    trial = from_plain(Trial, {**plain, "knobs": knobs, "number": number}, "trial")
    assert from_json(Trial, to_json(trial), "trial").knobs == knobs


NAME = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=5)
NAMES = st.lists(NAME, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    score=st.one_of(st.just(Magnitude()), st.just(Random()), st.builds(Mipp, noise=st.floats(0, 1))),
    keep=NAMES,
    constraints=st.builds(
        Constraints,
        least=st.dictionaries(NAME, st.integers(1, 9) | st.floats(0, 1, exclude_min=True), max_size=3),
        least_blocks=st.integers(0, 9),
        uniform=NAMES,
        tied=st.lists(NAMES, max_size=2).map(tuple),
    ),
)
def test_any_recipe_comes_back_with_its_variant(
    seed: int, score: Any, keep: tuple[str, ...], constraints: Constraints
) -> None:
    recipe = Recipe(seed=seed, score=score, keep=keep, constraints=constraints)
    again = from_json(Recipe, to_json(recipe), "recipe")
    assert again == recipe
    for name, value in constraints.least.items():  # 1 is one unit, 1.0 all of them
        assert type(again.constraints.least[name]) is type(value)


# --- strictness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('runtime = "onnxruntime"\nbatchsize = 1', ["batchsize: unknown key", "batch_size"]),
        ('runtime = "onnxruntime"\n[budget]\nlatency = "1x"', ["budget.latency: unknown key", "latency_p50"]),
        ('runtime = "openvino"', ["runtime", "'openvino'", "onnxruntime"]),
        ("batch_size = 1", ["runtime", "missing"]),
        ('runtime = "onnxruntime"\nbatch_size = "1"', ["batch_size", "'1'"]),
        ('runtime = "onnxruntime"\nbatch_size = 1.5', ["batch_size", "1.5"]),
        ('runtime = "onnxruntime"\nbatch_size = 0', ["batch_size must be >= 1, got 0", "write a whole number from 1"]),
        ('runtime = "onnxruntime"\nnum_latency_samples = 20', ["num_latency_samples", "200"]),
        ('runtime = "onnxruntime"\nprecisions = ["fp8"]', ["precisions", "fp8"]),
        ('runtime = "onnxruntime"\n[budget]\nlatency_p50 = "fast"', ["'fast' is not a number with a unit", "ms"]),
        ('runtime = "onnxruntime"\n[budget]\nlatency_p50 = "4 MiB"', ["'4 MiB'", "units: x, ms, us, s"]),
        ('runtime = "onnxruntime"\n[budget]\nlatency_p50 = 4.0', ["budget.latency_p50", '"4x"', '"4.0 ms"']),
        (
            'runtime = "onnxruntime"\nbogus = 1\nbatch_size = "1"\n[budget]\nlatency = ""\nmem = 2\nlatency_p50 = 0.8',
            ["4 problems", "budget.latency, budget.mem: unknown keys", "bogus: unknown key", "'1'", 'write "0.8x" (of'],
        ),
        ('runtime = "onnxruntime"\n[budget]\nmacs = "fast"\nparams = "0x"', ["2 problems", "'fast'", "got '0x'"]),
        ('runtime = "onnxruntime"\nbatch_size = 0\nnum_threads = 0', ["2 problems", "batch_size", "num_threads"]),
        ('runtime = "onnxruntime"\n[budget]\nmacs = "0x"', ["macs must be above zero, got '0x'"]),
        ('runtime = "onnxruntime"\n[budget]\naccuracy_drop_pp = -1.0', ["accuracy_drop_pp must be >= 0"]),
        ("runtime = ", ["is not TOML"]),
    ],
)
def test_wrong_target_files_name_file_key_and_remedy(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_toml(Target, target_file(tmp_path, text))
    message = str(caught.value)
    assert all(part in message for part in ["device.toml", *said]), message
    assert "\n" not in message


def test_absent_target_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_toml(Target, tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "targets").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_targets_load(path: Path) -> None:
    assert load_toml(Target, path).budget.limits()


@pytest.mark.parametrize("name", sorted(BUDGETS))
@given(number=st.integers(1, 10**6).map(lambda n: n / 1000))
@settings(max_examples=20, deadline=None)
def test_limits_are_read_in_every_unit(name: str, number: float) -> None:
    for unit, factor in BUDGETS[name].units.items():
        for text in (f"{number:.3f}{unit}", f" {number:.3f} {unit} "):
            limit = parse_limit(name, text)
            assert not limit.is_relative and limit.absolute(7.0) == pytest.approx(number * factor)
    relative = parse_limit(name, f"{number:.3f}x")
    assert relative.is_relative and relative.absolute(2.0) == pytest.approx(2 * number)


@given(text=st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_text_makes_a_budget_by_accident(text: str) -> None:
    try:
        limits = Budget(macs=text).limits()
    except ValueError as error:
        assert shown(text) in str(error)
    else:
        assert limits["macs"].value > 0


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_into_nested_fields() -> None:
    recipe = override(Recipe(), {"search.num_trials": "3", "finetune.precision": "fp32", "keep": '["conv1"]'})
    assert (recipe.search.num_trials, recipe.finetune.precision, recipe.keep) == (3, "fp32", ("conv1",))
    assert override(Target(runtime="onnxruntime"), {"budget.macs": "0.5x"}).budget.macs == "0.5x"
    bounds = {"constraints.least": '{"*.conv1" = 0.5, fc = 4}', "constraints.tied": '[["a", "b"]]'}
    assert override(Recipe(), bounds).constraints == Constraints(least={"*.conv1": 0.5, "fc": 4}, tied=(("a", "b"),))


def test_another_kind_starts_from_its_own_defaults() -> None:
    assert override(Recipe(score=Mipp(noise=0.5)), {"score.kind": "magnitude"}).score == Magnitude()
    assert override(Recipe(score=Magnitude()), {"score.kind": "mipp", "score.noise": "0.1"}).score == Mipp(noise=0.1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("search.num_trails", "3", "num_trials"),
        ("serch.num_trials", "3", "search"),
        ("sed", "3", "seed"),
        ("seed.deeper", "3", "no such key"),
        ("search.num_trials", "3.5", "3.5"),
        ("search.num_trials", "true", "True"),
        ("search.prune_blocks", "1", "search.prune_blocks"),
        ("score.kind", "nonsense", "nonsense"),
        ("score.noise", "loud", "loud"),
        ("search", "3", "search"),
        ("constraints.least", "{conv1 = 0}", "must be a number of units or a share"),
        ("constraints.least", "{conv1 = 1.5}", "must be a number of units or a share"),
        ("constraints.least", "{conv1 = true}", "constraints.least.conv1"),
        ("constraints.least_blocks", "-1", "least_blocks must be >= 0"),
    ],
)
def test_wrong_overrides_are_refused(key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Recipe(), {key: value})
    assert said in str(caught.value) and "--set" in str(caught.value)


def test_override_of_another_variants_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise"):
        override(Recipe(score=Magnitude()), {"score.noise": "0.1"})


def test_unknown_key_in_json_is_refused() -> None:
    plain = json.loads(to_json(Recipe()))
    plain["search"]["more"] = 1
    with pytest.raises(ConfigError, match=r"r\.json: search\.more: unknown key"):
        from_plain(Recipe, plain, "r.json")


def test_unknown_variant_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"score\.kind: there is no 'foo'; write one of 'magnitude', .*'label_mi'"):
        override(Recipe(), {"score.kind": "foo"})
