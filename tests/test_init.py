"""`deploypipe init` writes a pipeline for each kind of network that runs as it is, without a download."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import PipelineError
from deploypipe.target_files import load_target
from deploypipe.user_pipeline import load_pipeline

KINDS = ("torch", "huggingface", "timm")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_with_a_target_and_says_what_to_do_first(kind: str) -> None:
    done = invoke("init", "fresh_one", "--from", kind)
    assert done.exit_code == 0 and "deploypipe check fresh_one fresh_one" in done.output
    text = Path("pipelines/fresh_one.py").read_text(encoding="utf-8")
    compile(text, "fresh_one.py", "exec")
    assert "put your checkpoint here" in text and "put your data here" in text and "`deploypipe check PIPELINE`" in text
    assert load_target("fresh_one").budget.latency_p50 == "0.8x"


def test_nothing_is_overwritten_or_half_written() -> None:
    invoke("init", "fresh_one")
    Path("pipelines/fresh_one.py").unlink()
    again = invoke("init", "fresh_one")
    assert again.exit_code == 2 and "exists already" in again.output
    assert not Path("pipelines/fresh_one.py").exists()


def test_a_model_is_put_into_the_file_as_text_alone() -> None:
    invoke("init", "words", "an-owner/a.model", "--from", "huggingface")
    invoke("init", "images", "convnext_tiny", "--from", "timm")
    assert '\nCHECKPOINT = "an-owner/a.model"  # put' in Path("pipelines/words.py").read_text(encoding="utf-8")
    assert '\nMODEL = "convnext_tiny"  # any' in Path("pipelines/images.py").read_text(encoding="utf-8")
    for model, kind, said in (
        ('x" + exec("1") + "', "timm", "is not the name of a model; leave out quotes"),
        ("a\nb", "huggingface", "is not the name of a model"),
        ("resnet18", "torch", "--from torch takes no model; put your network into the file"),
    ):
        done = invoke("init", "other", model, "--from", kind)
        assert done.exit_code == 2 and said in done.output and not Path("pipelines/other.py").exists()
    assert invoke("init", "other", "--from", "keras").exit_code == 2


def test_torch_reads_weights_from_a_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    invoke("init", "mine")
    state = load_pipeline("mine", {"NUM_STEPS": "1"}).build_model().state_dict()
    save_file(state, "w.safetensors")
    torch.save({"state_dict": state}, "w.pt")
    for file in ("w.safetensors", "w.pt"):
        loaded = load_pipeline("mine", {"CHECKPOINT": file}).build_model().state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_batches_of_the_text_template_are_padded_to_their_own_longest_text() -> None:
    pytest.importorskip("transformers")
    invoke("init", "words", "--from", "huggingface")
    batches = list(load_pipeline("words").load_data().test)
    assert {tuple(inputs) for inputs, _ in batches} == {("input_ids", "attention_mask")}
    assert len({inputs["input_ids"].shape[1] for inputs, _ in batches}) > 1
    assert all(inputs["attention_mask"].sum(1).max() == inputs["input_ids"].shape[1] for inputs, _ in batches)


@pytest.mark.skipif(find_spec("timm") is not None, reason="it is installed here")
def test_an_absent_package_is_named_with_its_remedy() -> None:
    invoke("init", "images", "--from", "timm")
    done = invoke("check", "images", "images")
    assert done.exit_code == 2 and "imports 'timm', which is neither installed nor next" in done.output
    assert "pip install timm" in done.output


def test_a_package_of_another_name_is_named_as_pip_knows_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import cv2.no_such_part\n", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"imports 'cv2', .*pip install opencv-python"):
        load_pipeline("./mine.py")


@pytest.mark.slow  # trains and exports
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_the_check_as_written(kind: str) -> None:
    pytest.importorskip({"huggingface": "transformers"}.get(kind, kind))
    invoke("init", "fresh_one", "--from", kind)
    done = invoke("check", "fresh_one", "fresh_one", "--set", "pipeline.NUM_STEPS=2")
    assert done.exit_code == 0 and "ready to run" in done.output, done.output


@pytest.mark.slow  # imports `datasets`
def test_the_text_template_reads_a_folder_of_data() -> None:
    pytest.importorskip("datasets")
    Path("data").mkdir()
    for split, count in (("train", 100), ("validation", 30)):
        rows = [{"text": f"a {('fine', 'bad')[i % 2]} film {i}", "label": i % 2} for i in range(count)]
        Path("data", f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    invoke("init", "words", "--from", "huggingface")
    splits = load_pipeline("words", {"DATASET": "data"}).load_data()
    sizes = [sum(len(target) for _, target in getattr(splits, name)) for name in ("calib", "val", "train", "test")]
    assert sizes == [20, 20, 60, 30]
