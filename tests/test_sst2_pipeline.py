import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.errors import DataError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.recipe import Export
from deploypipe.task import Splits
from pipelines import sst2_transformer as sst2

TEXTS = ("one long string of cliches .", "a gob of drivel", "no movement , no yuks", "funny and moving")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few texts, each of which begins with the name of its file."""
    for name in sst2.FILES:
        rows = [f"{i % 2}\t{Path(name).stem} {text}\n" for i, text in enumerate(TEXTS * 5)]
        (tmp_path / name).write_text("label\tsentence\n" + "".join(rows), encoding="utf-8")
    monkeypatch.setattr(sst2, "SST2_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny_splits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    monkeypatch.setattr(sst2, "MIN_CALIB_LENGTH", 2)
    monkeypatch.setattr(sst2, "NUM_CALIB", 8)
    return sst2.load_data()


def pieces(split: object) -> list[str]:
    """The texts of a split, hidden pieces left out."""
    tokenizer = sst2._tokenizer(sst2.SST2_DIR)
    return [tokenizer.decode(row.tolist()) for ids, _ in split for row in ids]  # type: ignore[attr-defined]


def test_every_split_is_read_from_its_own_file(tiny_splits: Splits) -> None:
    for split, name, count in (
        (tiny_splits.val, "dev", 20),
        (tiny_splits.test, "test", 20),
        (tiny_splits.calib, "train", 8),
    ):
        texts = pieces(split)
        assert len(texts) == count
        assert all(text.replace(" ", "").replace("Ġ", "").startswith(name) for text in texts)


def test_a_pass_follows_from_its_epoch(tiny_splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sst2, "BATCH_SIZE", 4)
    train = tiny_splits.train
    assert isinstance(train, sst2.Phrases) and len(train) == 5

    def passed(epoch: int) -> list[list[int]]:
        train.set_epoch(epoch)
        return [row.tolist() for ids, _ in train for row in ids]

    assert passed(1) == passed(1) != passed(2)
    train.set_epoch(1)
    assert sum(len(ids) for ids, _ in train) == 20
    assert all(ids.shape[1] == int(sst2._lengths(ids).max()) < sst2.LENGTH for ids, _ in train)


def test_vocabulary_is_the_same_in_another_process(tiny_splits: Splits, tiny: Path) -> None:
    code = "from pipelines import sst2_transformer as s; print(s._digest())"
    environment = {**os.environ, "SST2_DIR": str(tiny), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == sst2._digest()


def test_padding_changes_nothing_and_the_file_agrees(tiny_splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = sst2.SentenceNet().eval(), list(tiny_splits.val)
    ids = batches[0][0]
    with torch.no_grad():
        assert torch.allclose(model(ids), model(ids[:, : int(sst2._lengths(ids).max())]), atol=1e-5)
    assert export_onnx(model, batches, tmp_path / "m.onnx", Export()).max_abs_error < 1e-4


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_absent_data_says_where_it_is_published(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sst2, "SST2_DIR", folder)
    with pytest.raises(DataError, match=r"nlp\.stanford\.edu.*train\.tsv.*SST2_DIR"):
        sst2.load_data()


def test_wrong_line_is_named(tiny: Path) -> None:
    with (tiny / "train.tsv").open("a", encoding="utf-8") as stream:
        stream.write("0.5\thalf of a label\n")
    with pytest.raises(DataError, match=r"train\.tsv: line 22"):
        sst2.load_data()


def test_absent_package_names_its_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"deploypipe\[text\]"):
        sst2.load_data()


@pytest.mark.slow
def test_accuracy_after_one_epoch(tmp_path: Path, sst2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the 1,821 sentences of test, half of them positive, after a third of the phrases of train: with all of them it
    takes minutes, and comes to 80.6 %."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(sst2_dir, data, copy_function=shutil.copyfile)
    header, *phrases = (data / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "train.tsv").write_text(header + "".join(phrases[::3]), encoding="utf-8")
    monkeypatch.setattr(sst2, "SST2_DIR", str(data))
    monkeypatch.setattr(sst2, "NUM_EPOCHS", 1)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(cache))
    hits = evaluate_module(sst2.build_model(), sst2.load_data().test, sst2.task())
    assert len(hits) == 1821 and hits.mean() > 0.72, hits.mean()
    assert len(list(cache.iterdir())) == 1
