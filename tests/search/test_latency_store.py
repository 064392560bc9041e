"""The cache of latencies: damaged entries are measured again."""

from pathlib import Path

import pytest

from deploypipe.search.evaluation.latency_store import LocalLatencyStore
from deploypipe.text.sealed_json import seal

KEY, RATIO = "0123456789abcdef", 0.6180339887498949


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    LocalLatencyStore().publish(KEY, RATIO, is_precise=True)
    return tmp_path / "latency" / KEY


def known() -> float | None:
    found = LocalLatencyStore().find(KEY)
    return None if found is None else found.ratio


def test_a_stored_latency_is_read_exactly(entry: Path) -> None:
    assert known() == RATIO
    assert LocalLatencyStore().find("another") is None


def test_a_flipped_bit_or_lost_byte_never_changes_a_latency(entry: Path) -> None:
    whole = entry.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            entry.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert known() in (None, RATIO), (place, bit)
        entry.write_bytes(whole[:place])
        assert known() is None
    LocalLatencyStore().publish(KEY, 0.5, is_precise=True)
    assert known() == 0.5


@pytest.mark.parametrize("ratio", ["0", "-1.0", "1", "null", "true", '"0.5"', "[0.5]", "NaN", "Infinity", "1e999"])
def test_an_invalid_stored_latency_is_measured_again(ratio: str, entry: Path) -> None:
    entry.write_bytes(seal(f'{{"key": "{KEY}", "ratio": {ratio}}}'))
    assert known() is None
    entry.write_bytes(ratio.encode())
    assert known() is None


def test_an_entry_under_another_name_is_not_read(entry: Path) -> None:
    entry.rename(entry.with_name("fedcba9876543210"))
    assert LocalLatencyStore().find("fedcba9876543210") is None
    entry.mkdir()
    assert known() is None
