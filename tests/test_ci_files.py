"""The files for continuous integration work when copied: schemas, names, and the steps that they run."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from deploypipe.shipped_examples import shipped_folder

ROOT = Path(__file__).parents[1]
OURS = "deploypipe/deploypipe/"
SCHEMAS = {
    ".github/workflows/checks.yml": "vendor.github-workflows",
    ".github/workflows/compress.yml": "vendor.github-workflows",
    ".github/actions/compress/action.yml": "vendor.github-actions",
    "examples/ci/github.yml": "vendor.github-workflows",
    "examples/ci/gitlab.yml": "vendor.gitlab-ci",
}
WORKFLOW = ROOT / ".github/workflows/compress.yml"
ACTION = ROOT / ".github/actions/compress/action.yml"


@pytest.mark.parametrize("path", SCHEMAS)
def test_files_fit_their_schemas(path: str) -> None:
    checker = pytest.importorskip("check_jsonschema", reason="check-jsonschema, which holds the schemas, is absent")
    done = CliRunner().invoke(checker.main, ["--builtin-schema", SCHEMAS[path], str(ROOT / path)])
    assert done.exit_code == 0, done.output


def test_the_audit_finds_nothing() -> None:
    """Actions pinned by commit, least permissions, no text of a pull request in a shell, no credentials left behind."""
    zizmor = shutil.which("zizmor", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if zizmor is None:
        pytest.skip("zizmor, which audits workflows, is absent")
    command = [zizmor, "--offline", "--no-progress", "--config", ".github/zizmor.yml", ".github", "examples/ci"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_copied_into_an_empty_repository_they_name_what_exists(tmp_path: Path) -> None:
    copies = dict(re.findall(r"^\| `(examples/\S+)` \| `(\S+)` \|", page("docs/how-to/ci.md"), re.M))
    assert copies.keys() == {"examples/ci/github.yml", "examples/ci/gitlab.yml", "examples/ci/job.sh"}
    for source, destination in copies.items():
        (tmp_path / destination).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / destination)
    init = [sys.executable, "-m", "deploypipe", "init", "my_model"]
    subprocess.run(init, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    for job in load(tmp_path / copies["examples/ci/github.yml"])["jobs"].values():
        check_call_of_ours(job)
        assert_exists(tmp_path, "pipelines", job["with"]["pipeline"])
        for device in json.loads(job["with"]["targets"]):
            assert_exists(tmp_path, "targets", device["target"])
    gitlab = load(tmp_path / copies["examples/ci/gitlab.yml"])
    assert_exists(tmp_path, "pipelines", gitlab[".compress"]["variables"]["PIPELINE"])
    for job in gitlab.values():
        if "extends" in job:
            assert_exists(tmp_path, "targets", job["variables"]["TARGET"])
            assert job["extends"] in gitlab


def check_call_of_ours(job: Mapping[str, Any]) -> None:
    """The call fits the workflow, and the workflow's calls of actions fit them; all that is ours has this version."""
    called = called_file(job["uses"])
    accepted = called[True]["workflow_call"]  # YAML reads the key `on` as a boolean
    assert_inputs(job["with"], accepted["inputs"])
    assert set(job["secrets"]) <= set(accepted["secrets"])
    wanted = {name for each in called["jobs"].values() for name in each["permissions"]}
    assert wanted <= set(job["permissions"]), "a called workflow gets no permission that its caller lacks"
    for each in called["jobs"].values():
        for step in each["steps"]:
            if (uses := step.get("uses", "")).startswith(OURS):
                assert_inputs(step["with"], called_file(uses)["inputs"])


def called_file(uses: str) -> dict[Any, Any]:
    path, _, tag = uses.removeprefix(OURS).partition("@")
    assert uses.startswith(OURS) and tag == f"v{version('deploypipe')}"
    return load(ROOT / path if path.endswith(".yml") else ROOT / path / "action.yml")


def assert_inputs(given: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    assert set(given) <= set(accepted)
    assert {name for name, about in accepted.items() if about.get("required")} <= set(given)


def assert_exists(repository: Path, folder: str, name: str) -> None:
    """A file of the repository, or one that comes with the package."""
    suffix = {"pipelines": ".py", "targets": ".toml"}[folder]
    assert any((where / f"{name}{suffix}").is_file() for where in (repository / folder, shipped_folder(folder)))


def test_one_package_is_installed_everywhere() -> None:
    gitlab = load(ROOT / "examples/ci/gitlab.yml")[".compress"]["script"][0]
    names = {
        load(WORKFLOW)[True]["workflow_call"]["inputs"]["package"]["default"],
        load(ACTION)["inputs"]["package"]["default"],
        gitlab.removeprefix("pip install ").strip("'"),
    }
    assert names == {f"deploypipe[demo,release]=={version('deploypipe')}"}


def test_a_name_for_artifacts_has_no_slash(tmp_path: Path) -> None:
    done = Played(tmp_path, {"pipeline": "models/vision:v2.py", "target": "x86_cpu"})
    done.play(steps(ACTION)[:1])
    assert done.outputs["steps.name.outputs.name"] == "models-vision-v2.py-x86_cpu"


def test_a_pull_request_has_one_comment_that_is_kept_up_to_date(tmp_path: Path) -> None:
    """`gh` is the only part of GitHub: a script that keeps comments in a folder stands for it."""
    (tmp_path / "gh").write_text(GH, encoding="utf-8")
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "artifacts" / "one").mkdir(parents=True)
    (tmp_path / "artifacts" / "two").mkdir()
    (tmp_path / "artifacts" / "one" / "comment.md").write_text("HOLD\n")
    (tmp_path / "artifacts" / "two" / "comment.md").write_text("SHIP\n")
    step = next(s for s in load(WORKFLOW)["jobs"]["comment"]["steps"] if "run" in s)
    context = {
        "github.token": "secret",
        "github.repository": "me/mine",
        "github.event.pull_request.number": "7",
        "inputs.pipeline": "my_model",
    }
    for verdict in ("HOLD", "SHIP"):
        (tmp_path / "artifacts" / "one" / "comment.md").write_text(f"{verdict}\n")
        Played(tmp_path, {}, context).play([step])
        comments = list((tmp_path / "comments").iterdir())
        assert [path.read_text() for path in comments] == [f"<!-- deploypipe my_model -->\n{verdict}\nSHIP\n"]


GH = """#!/usr/bin/env bash
set -euo pipefail
[ "$GH_TOKEN" = secret ]
mkdir -p comments
case "$*" in
  *--paginate*) [ -f comments/5 ] && grep -qF "$MARKER" comments/5 && echo 5 || true ;;
  *"PATCH repos/me/mine/issues/comments/5"*) [ -f comments/5 ] && cp body.md comments/5 ;;
  *"repos/me/mine/issues/7/comments"*) [ ! -f comments/5 ] && cp body.md comments/5 ;;
  *) exit 1 ;;
esac
"""
TARGET = 'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "0.5x"\naccuracy_drop_pp = 20.0\n'


@pytest.mark.slow
def test_the_steps_compress_decide_release_and_promote(tmp_path: Path) -> None:
    """GitHub's action and promotion, then GitLab's script with the same run, as their runners would start them."""
    pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")
    for folder, name, text in (
        ("pipelines", "small.py", "from tiny_pipeline import *\n"),
        ("targets", "cpu.toml", TARGET),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text, encoding="utf-8")
    key = subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"], capture_output=True, text=True, check=True
    )
    defaults = {name: about.get("default", "") for name, about in load(ACTION)["inputs"].items()}
    inputs = {**defaults, "pipeline": "small", "target": "cpu", "package": "deploypipe", "registry": "registry"}
    job = Played(tmp_path, {**inputs, "signing-key": key.stdout, "registry-environment": "A_SETTING=of the registry"})
    job.play(steps(ACTION))
    assert job.outputs["steps.gate.outputs.verdict"] == "SHIP"
    results = tmp_path / "deploypipe-results"
    assert {path.name for path in results.iterdir()} == {"comment.md", "checks.xml", "report.html", "bundles"}
    assert "SHIP" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "key.pem").exists()

    shutil.copytree(results, tmp_path / "artifacts" / "deploypipe-small-cpu")
    step = load(WORKFLOW)["jobs"]["promote"]["steps"][-1]
    Played(tmp_path, inputs, {"secrets.registry-environment": ""}).play([step])
    assert json.loads((tmp_path / "registry/small-cpu/aliases.json").read_text()) == {"production": 1}

    script = "\n".join(load(ROOT / "examples/ci/gitlab.yml")[".compress"]["script"][1:])
    # With a registry, two files would be timed against each other: a busy machine could not decide.
    variables = {"PIPELINE": "small", "TARGET": "cpu", "REGISTRY": ""}
    (tmp_path / "runs" / "small-cpu").rename(tmp_path / "runs" / "cpu")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env={**environment(), **variables}, check=True)
    assert len(list((tmp_path / "bundles").iterdir())) == 1


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(action: Path) -> list[dict[str, Any]]:
    return load(action)["runs"]["steps"]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }


class Played:
    """A job's bash steps, run one after the other in a folder, with what a runner gives them."""

    def __init__(self, folder: Path, inputs: Mapping[str, str], context: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {f"inputs.{name}": value for name, value in inputs.items()} | dict(context or {})

    def play(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if "run" in step and self._applies(step.get("if", "always()")):
                self._run(step)

    def _applies(self, condition: str) -> bool:
        if condition == "always()":
            return True
        name, _, wanted = condition.partition(" == ")
        return self.outputs.get(name, "") == wanted.strip("'")

    def _run(self, step: Mapping[str, Any]) -> None:
        files = {name: self.folder / f"{name}.txt" for name in ("GITHUB_OUTPUT", "GITHUB_ENV")}
        files["GITHUB_OUTPUT"].write_text("")
        variables = {name: self._filled(str(value)) for name, value in step.get("env", {}).items()}
        given = {name: str(path) for name, path in files.items()}
        given |= {"GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"), "RUNNER_TEMP": str(self.folder)}
        path = {"PATH": f"{self.folder}:{environment()['PATH']}"}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        assert "${{" not in step["run"], "a value goes into a script by its environment"
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**environment(), **variables, **given, **path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (step.get("name"), done.stdout[-3000:], done.stderr[-3000:])
        for line in files["GITHUB_OUTPUT"].read_text().splitlines():
            name, _, value = line.partition("=")
            self.outputs[f"steps.{step['id']}.outputs.{name}"] = value

    def _filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: self.outputs.get(match[1], ""), text)
