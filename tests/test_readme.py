import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    (command,) = [line for line in commands() if line.startswith("python3 -m venv") and ".ci/check" in line]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"(?:pipelines|targets)/\w+\.(?:py|toml)", text)) - {
        "pipelines/my_model.py",
        "targets/my_model.toml",
    }:
        assert (ROOT / path).is_file(), path
    for pipeline, target in re.findall(r"deploypipe run (\w+) (\w+)", text):
        if pipeline != "my_model":
            assert (ROOT / "pipelines" / f"{pipeline}.py").is_file()
            assert (ROOT / "targets" / f"{target}.toml").is_file()


def test_python_example_is_python() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "README.md", "exec")
