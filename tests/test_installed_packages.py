"""ONNX Runtime in another of its packages, or in none: real folders of installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).parents[1]
VERSION = onnxruntime.__version__


def lay_out(folder: Path, distribution: str) -> Path:
    """The installed packages, linked, with onnxruntime under the name of `distribution` ("": absent)."""
    site = Path(onnxruntime.__file__).parents[1]
    folder.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith("onnxruntime"):
            (folder / entry.name).symlink_to(entry)
    if not distribution:
        return folder
    module = folder / "onnxruntime"
    (module / "capi").mkdir(parents=True)
    for place in (Path(), Path("capi")):
        for entry in (site / "onnxruntime" / place).iterdir():
            if entry.name not in ("capi", "build_and_package_info.py"):
                (module / place / entry.name).symlink_to(entry)
    about = f"package_name = {distribution!r}\n__version__ = {VERSION!r}\n"
    (module / "capi" / "build_and_package_info.py").write_text(about)
    write_metadata(folder, distribution)
    return folder


def write_metadata(folder: Path, distribution: str) -> None:
    info = folder / f"{distribution.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: {VERSION}\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


def run(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these packages only (-S: those of this process are not added)."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


ORIGIN = """
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from deploypipe.benchmark.environment import describe_environment
from deploypipe.doctor import _onnxruntime
from deploypipe.export.onnx_graphs.file_metadata import _versions
from deploypipe.installed_packages import package_versions
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.onnxruntime import PROVIDERS, missing_provider
from deploypipe.stages.context import PACKAGES
from deploypipe.target import Target
try:
    version("onnxruntime")
except PackageNotFoundError:
    print("no onnxruntime")
print(package_versions(*PACKAGES)["onnxruntime-openvino"], describe_environment(1).versions["onnxruntime-openvino"])
print(_versions()["onnxruntime_version"], can(Target(runtime="onnxruntime")).verdict)
print(can(Target(runtime="onnxruntime", runtime_version="0.1")).reason)
print(missing_provider(PROVIDERS["cuda"]))

[info] = Path(sys.argv[1]).glob("onnxruntime_*.dist-info")
shutil.copytree(info, info.with_name("onnxruntime-1.dist-info"))
metadata = info.with_name("onnxruntime-1.dist-info") / "METADATA"
metadata.write_text(metadata.read_text().replace("-openvino", ""))
finding = _onnxruntime()
print(finding.status, finding.detail, finding.remedy, sep="; ")
"""


def test_another_package_of_onnxruntime(tmp_path: Path) -> None:
    packages = lay_out(tmp_path / "packages", "onnxruntime-openvino")
    done = run(packages, "-c", ORIGIN, str(packages))
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[:3] == ["no onnxruntime", f"{VERSION} {VERSION}", f"{VERSION} run"]
    assert f"onnxruntime-openvino {VERSION} is installed and the target is for 0.1" in told[3]
    assert told[4].endswith("pip uninstall onnxruntime-openvino && pip install onnxruntime-gpu")
    both = "onnxruntime and onnxruntime-openvino are installed and overwrite each other's files"
    remedy = "pip uninstall onnxruntime onnxruntime-openvino, then install one of them"
    assert told[5:] == [f"limited; onnxruntime-openvino {VERSION}; {both}; {remedy}"]


MISSING = """
import sys
from deploypipe.errors import RuntimeUnavailableError
try:
    from deploypipe import export_onnx
except RuntimeUnavailableError as error:
    print(error)
from deploypipe.cli import main
sys.argv = ["deploypipe", "doctor"]
main()
"""


def test_no_package_of_onnxruntime_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    done = run(lay_out(tmp_path / "packages", ""), "-c", MISSING)
    assert done.returncode == 2
    assert done.stdout.startswith("no package brings onnxruntime here; pip install 'deploypipe[cpu]' (")
    assert done.stderr == f"error: {done.stdout}"
