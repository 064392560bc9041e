"""README and docs/: the Python runs, shell commands parse with options that exist, files load."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_blockwise
import tiny_pipeline as tiny
import torch
import typer
from torch import nn
from torch.nn import functional as F

import deploypipe
import pipelines
from deploypipe import load_target
from deploypipe.cli import app
from deploypipe.data import TensorBatches
from deploypipe.files.json_records import override
from deploypipe.recipe import Constraints, Recipe
from deploypipe.release.waivers import load_waivers
from deploypipe.target import Target
from deploypipe.task import Splits, Task

ROOT = Path(__file__).parents[1]
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.relative_to(ROOT).parts[1][0] != "_"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FOR_USERS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CONTRIBUTING.md")
OWN = re.compile("(my_|toy|[A-Z])")  # names of what the reader has


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Each once, in the order of the pages."""
    return list(dict.fromkeys(re.findall(rf"```{language}\n(.*?)```", text, re.S)))


def commands(text: str = TEXT) -> list[list[str]]:
    """The words of every command in a shell block or in inline code, without variables set before it."""
    lines = [line for block in blocks("bash", text) for line in block.splitlines()]
    lines += [
        span for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)) if "..." not in span
    ]
    found = []
    for part in (part for line in lines for part in line.split("&&")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # inline code that is no command
            continue
        while words and re.match(r"[A-Z_0-9]+=", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def arguments_of_deploypipe() -> Iterator[list[str]]:
    for words in commands():
        if "-m" in words and words[words.index("-m") + 1] == "deploypipe":
            yield words[words.index("-m") + 2 :]
        elif words[0] == "deploypipe":
            yield words[1:]


def parse(command: Any, name: str, arguments: list[str], parent: Any = None) -> None:
    """As the program does, without doing anything; raises on an option, value or command that does not exist."""
    if not hasattr(command, "commands"):
        command.make_context(name, list(arguments), parent=parent)
        return
    context = command.make_context(name, list(arguments), parent=parent)
    inner, found, rest = command.resolve_command(context, list(arguments))
    parse(found, inner, rest, context)


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    readme = blocks("bash", PAGES[0].read_text(encoding="utf-8"))
    (command,) = [
        line for block in readme for line in block.splitlines() if re.fullmatch("python3.* && .ci/check", line)
    ]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_shell_blocks_are_shell() -> None:
    subprocess.run(["bash", "-n"], input="\n".join(blocks("bash")), text=True, check=True)


def test_commands_have_the_options_that_the_program_has() -> None:
    tried = set()
    program = typer.main.get_command(app)
    for arguments in arguments_of_deploypipe():
        if arguments and not arguments[0].isupper():  # COMMAND stands for any
            words = (
                arguments if len(arguments) > 1 else [*arguments, "--help"]
            )  # a mere name: there must be such a command
            try:
                parse(program, "deploypipe", words)
            except typer.Exit:  # of --help
                pass
            except Exception as error:
                # Prose may leave out an argument; "Missing" is said after all options were read.
                assert "Missing parameter" in str(error), f"deploypipe {shlex.join(arguments)}: {error}"
            tried.add(arguments[0])
    assert tried >= {"run", "init", "check", "doctor", "score", "gate", "release", "promote", "verify", "worker"}
    with pytest.raises(Exception, match="No such option"):
        parse(program, "deploypipe", ["run", "digits", "x86_cpu", "--nosuch"])


def test_settings_are_settings() -> None:
    settings = [after for words in commands(FOR_USERS) for word, after in pairwise(words) if word == "--set"]
    assert len(settings) > 5
    for setting in settings:
        key, value = setting.split("=", 1)
        if key.startswith("target."):
            override(Target(runtime="onnxruntime"), {key.removeprefix("target."): value})
        elif not key.startswith("pipeline."):
            override(Recipe(), {key: value})


def test_benchmarks_have_their_options() -> None:
    run = [
        words for words in commands() if words[0] == "python" and len(words) > 1 and words[1].startswith("benchmarks/")
    ]
    assert run
    for _, script, *arguments in run:
        text = (ROOT / script).read_text(encoding="utf-8")
        assert [option for option in arguments if option.startswith("--") and f'"{option}"' not in text] == [], script


def test_pipelines_and_targets_that_are_run_exist() -> None:
    for path in set(re.findall(r"(?:pipelines|targets|benchmarks)/\w+\.(?:py|toml|md)", TEXT)):
        assert (ROOT / path).is_file() or OWN.match(Path(path).stem), path
    named = [
        arguments[1:] for arguments in arguments_of_deploypipe() if arguments[:1] == ["run"] and len(arguments) > 2
    ]
    for pipeline, target, *_ in named:
        for name, folder, ending in ((pipeline, "pipelines", "py"), (target, "targets", "toml")):
            file = ROOT / name if "/" in name else ROOT / folder / f"{name}.{ending}"
            assert OWN.match(name) or file.is_file(), name


def test_toml_loads(tmp_path: Path) -> None:
    kinds = set()
    for block in blocks("toml"):
        (tmp_path / "file.toml").write_text(block, encoding="utf-8")
        is_target = "runtime" in tomllib.loads(block)
        assert (load_target if is_target else load_waivers)(tmp_path / "file.toml")
        kinds.add(is_target)
    assert kinds == {True, False}


def reader(folder: Path) -> dict[str, Any]:
    """What a reader has at hand who tries the Python of a page."""
    model, data = tiny.build_model(), digits_in_small().load_data()
    inputs = next(iter(data.calib))[0]
    return {
        "nn": nn,
        "torch": torch,
        "Splits": Splits,
        "Task": Task,
        "Recipe": Recipe,
        "Constraints": Constraints,
        "model": model,
        "inputs": inputs,
        "example_inputs": inputs,
        "loader": data.calib,
        "build_model": test_blockwise.build_network,
        "batches": test_blockwise.batches(),
    }


def digits_in_small() -> ModuleType:
    """A pipeline that stands in for the digits: it trains in a second on images of the same shape."""
    module = ModuleType("pipelines.digits")
    module.__dict__.update({name: getattr(tiny, name) for name in ("build_model", "task", "recipe")})

    def padded(split: Any) -> TensorBatches:
        return TensorBatches(F.pad(split.inputs, (1, 1, 1, 1)), split.targets, split.batch_size)

    def load_data() -> Splits:
        small = tiny.load_data()
        return Splits(
            calib=padded(small.calib), train=padded(small.train), val=padded(small.val), test=padded(small.test)
        )

    module.load_data = load_data  # type: ignore[attr-defined]
    return module


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, as the reader pastes it; the blocks of a page share their names. A small network stands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    small = digits_in_small()
    monkeypatch.setitem(sys.modules, "pipelines.digits", small)
    monkeypatch.setitem(sys.modules, "digits_cnn", small)
    monkeypatch.setattr(pipelines, "digits", small, raising=False)
    monkeypatch.setattr(deploypipe, "load_target", lambda name: tiny.target() if load_target_named(name) else None)
    test_blockwise.saved(test_blockwise.build_network, tmp_path).rename(tmp_path / "model.safetensors")
    given, made, done = reader(tmp_path), {}, dict[str, dict[str, Any]]()
    first = ROOT / "docs" / "reference" / "python.md"  # it makes the run that other pages read
    for page in [first, *(page for page in PAGES if page not in (first, ROOT / "CONTRIBUTING.md"))]:
        names = dict(given)
        for block in blocks("python", page.read_text(encoding="utf-8")):
            if block not in done:  # a block that two pages share runs once, and both have its names
                before = dict(names)
                exec(compile(block, str(page.relative_to(ROOT)), "exec"), names)
                done[block] = {name: value for name, value in names.items() if before.get(name) is not value}
            names |= done[block]
        made |= names
        if page == first:
            assert (tmp_path / "runs" / "from_python" / "model.onnx").is_file()
            for name in ("digits-x86_cpu", "digits_cnn-x86_cpu"):
                shutil.copytree(tmp_path / "runs" / "from_python", tmp_path / "runs" / name)
    assert made["result"].decision.verdict and made["small"] and made["network"] and made["logits"].shape == (1, 4)


def load_target_named(name: str) -> Target:
    return load_target(ROOT / "targets" / f"{name}.toml")
