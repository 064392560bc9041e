"""Settings that make no sense: every value of every field gives a sound record or one clear error, from any file."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import ConfigError
from deploypipe.files.json_records import (
    checked,
    from_json,
    from_plain,
    load_toml,
    override,
    read_toml,
    to_json,
    to_plain,
)
from deploypipe.recipe import LogitDivergence, Mipp, Recipe, Repair
from deploypipe.release.waivers import load_waivers
from deploypipe.target import Budget, Target
from deploypipe.text.printable_text import HIDDEN

TARGET = Target(runtime="onnxruntime", provider="cuda", budget=Budget(latency_p50="4 ms"), batch_range=(1, 2, 4))
RECORDS = (Recipe(), TARGET)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**9, 2**64, -(2**70), 10**4000]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324]),
    st.text(max_size=6),
    st.sampled_from(["", "1e999x", "9" * 5000 + "x", "9" * 400 + " GiB", "\x1b[31m", "\u202e", "../..", "@a"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def paths(record: Any, start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field in fields(record):
        yield (*start, field.name)
        if is_dataclass(inner := getattr(record, field.name)):
            yield from paths(inner, (*start, field.name))


PLACES = [(record, path) for record in RECORDS for path in paths(record)]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def require_sound(record: Any) -> None:
    assert from_json(type(record), to_json(record), "again") == record
    for number in numbers(to_plain(record)):
        assert abs(number) < (2**32 if isinstance(number, int) else 2e30), number  # the largest: learning_rate


def require_clear(error: ConfigError, *parts: str) -> None:
    text = str(error)
    assert all(part in text for part in parts), text
    assert not HIDDEN.search(text) and len(text) < 900, text
    assert error.problem and error.remedy


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(PLACES), value=values)
@example(place=(TARGET, ("budget", "accuracy_drop_pp")), value=math.nan)
@example(place=(Recipe(), ("search", "num_trials")), value=10**12)
@example(place=(Recipe(), ("seed",)), value=2**64)
@example(place=(Recipe(), ("seed",)), value=[2**14000 * 4**1000])
def test_any_value_of_any_field(place: tuple[Any, tuple[str, ...]], value: Any) -> None:
    record, path = place
    plain = to_plain(record)
    parent = plain
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    try:
        made = from_plain(type(record), plain, "x.toml")
    except ConfigError as error:
        require_clear(error, "x.toml")
    else:
        require_sound(made)


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(PLACES), text=st.text(max_size=12))
@example(place=(Recipe(), ("seed",)), text="[" * 100_000)
@example(place=(Recipe(), ("seed",)), text="9" * 5000)
@example(place=(Recipe(), ("seed",)), text="1\nother = 2")
@example(place=(TARGET, ("num_threads",)), text="inf")
def test_any_text_of_any_setting(place: tuple[Any, tuple[str, ...]], text: str) -> None:
    record, path = place
    try:
        made = override(record, {".".join(path): text})
    except ConfigError as error:
        require_clear(error, "--set")
    else:
        require_sound(made)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_as_a_file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    for read in (read_toml, load_waivers, lambda path: load_toml(Target, path)):
        try:
            read(path)
        except ConfigError as error:
            require_clear(error, "any.toml")


START = b'runtime = "onnxruntime"\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(START + b"x = " + b"[" * 50_000, "more than 64 deep", id="deep"),
        pytest.param(START + b"a." * 500_000 + b"b = 1", "more than 1000 dots", id="dotted"),
        pytest.param(START + b"a." * 900 + b"b = 1", "more than 64 deep", id="tables"),
        pytest.param(START + b"batch_size = " + b"9" * 5000, "thousands of digits", id="digits"),
        pytest.param(START + b"[budget]\naccuracy_drop_pp = nan", "budget.accuracy_drop_pp: is not a finite", id="nan"),
        pytest.param(START + b"[budget]\nlatency_regression = inf", "latency_regression: is not a finite", id="inf"),
        pytest.param(START + b"num_threads = 1000000000", "num_threads must be <= 4096, got 1000000000", id="big"),
        pytest.param(START + b"batch_size = 1\nbatch_size = 2", "is not TOML", id="twice"),
        pytest.param(START + b'name = "a\x00b"', "is not TOML", id="NUL"),
        pytest.param(START + b'description = "\xff"', "is not UTF-8 (byte", id="bytes"),
        pytest.param(START + b'board = "a\\u001b[2J"', "U+001B", id="escape"),
        pytest.param(START + b'board = "a\\u202eb"', "U+202E", id="bidi"),
        pytest.param(START + b"#" * 2**20, "has more than 1048576 bytes", id="long"),
        pytest.param(START + b"Batch = 1", "Batch: unknown key", id="capital"),
        pytest.param(START + b'"a\\n\\u001b[2J" = 1', "unknown key", id="key"),
        pytest.param(START + b"batch_size = 2026-01-01", "batch_size: '2026-01-01' does not fit", id="date"),
        pytest.param(START + b'memory = "' + b"9" * 400 + b' GiB"', "not an amount of memory", id="memory"),
    ],
)
def test_a_target_file_that_makes_no_sense_is_one_line(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.toml").write_bytes(content)
    done = CliRunner().invoke(app, ["run", "digits", "./odd.toml"])
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: odd.toml") and said in line and not HIDDEN.search(line) and len(line) < 900, line
    assert [path.name for path in tmp_path.iterdir()] == ["odd.toml"]


def test_marks_line_ends_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + START.replace(b"\n", b"\r\n") + b"batch_size = 2\r\n")
    assert load_toml(Target, path).batch_size == 2
    with pytest.raises(ConfigError, match="is not a file"):
        read_toml(tmp_path)
    with pytest.raises(ConfigError, match="is not a path"):
        read_toml(Path("a\0b"))


def test_a_recipe_made_in_python_is_checked_too() -> None:
    assert checked(Recipe(score=Mipp(noise=0.5)), "pipe.py") == Recipe(score=Mipp(noise=0.5))
    for wrong in (Recipe(score="mipp"), Recipe(repair=LogitDivergence()), Recipe(keep="conv1")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"pipe\.py"):
            checked(wrong, "pipe.py")
    with pytest.raises(ValueError, match="ridge must be finite, got nan"):
        Repair(ridge=math.nan)
