"""Children that start in milliseconds: forks of one Python that has imported torch and this package already.

Importing them takes seconds of processor time, and no test of what a command does need pay for it again. Tests of how a
program starts use `subprocess`. Run as a program, this file is the server: `warm_python.py DESCRIPTOR`.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

HERE = Path(__file__).parent
_AT_ONCE = 2**16  # bytes


class Child:
    """A program at work, alone in its session, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> None:
        request = {"arguments": arguments, "folder": str(folder), "environment": dict(environment)}
        pipes = [os.pipe() for _ in range(3)]
        server = _server()
        socket.send_fds(server, [f"{json.dumps(request)}\n".encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.arguments = arguments
        self.stdout, self.stderr, self._fate = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = int(self._fate.readline())
        os.set_blocking(self._fate.fileno(), False)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code once it has ended; of one that a signal ended, minus its number."""
        if self.returncode is None and (line := self._fate.readline()):
            self.returncode = int(line)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What else it writes until it ends; one that takes longer is killed, with all that it started."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                said, errors = (text.result(timeout) for text in texts)
            except TimeoutError:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.arguments, timeout) from None
        os.set_blocking(self._fate.fileno(), True)
        self.poll()
        return said, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(folder: Path, *arguments: str, num_threads: int = 1, **variables: str) -> Child:
    """`python ARGUMENTS` (-m MODULE ..., or SCRIPT ...), at work in `folder`; it may import the tests' helpers."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "DEPLOYPIPE_CACHE": str(folder / "cache"),
    }
    return Child(arguments, folder, environment | variables)


def run(folder: Path, *arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """`start`, and wait until it ends."""
    child = start(folder, *arguments, **variables)
    said, errors = child.communicate(timeout)
    assert child.returncode is not None
    return subprocess.CompletedProcess(arguments, child.returncode, said, errors)


@cache
def _server() -> socket.socket:
    """One for each process that tests; it ends with this end of its socket."""
    ours, its = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(Path(__file__)), str(its.fileno())]
    subprocess.Popen(command, pass_fds=[its.fileno()], env=environment, stdin=subprocess.DEVNULL)
    its.close()
    return ours


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork for each request. Returns in the children alone: there, what is asked of it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, ends, _, _ = socket.recv_fds(requests, _AT_ONCE, 3)
        while text and not text.endswith(b"\n"):
            text += requests.recv(_AT_ONCE)
        if not text:
            os._exit(0)
        if os.fork() == 0:
            break
        for end in ends:
            os.close(end)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, fate = ends
    if child := os.fork():
        for end in (out, err):
            os.close(end)
        os.write(fate, f"{child}\n".encode())
        os.write(fate, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.setsid()
    os.close(fate)
    os.dup2(out, 1)
    os.dup2(err, 2)
    return dict(json.loads(text))


def _become(asked: dict[str, Any]) -> NoReturn:
    """Run what is asked as Python would that has just started, and end: native threads of the parent are not here to
    be waited for, so that the interpreter's own end would never come."""
    torch = importlib.import_module("torch")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, tests too, ignore it
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    code = _exit_code(asked["arguments"], asked["folder"])
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _exit_code(arguments: list[str], folder: str) -> int:
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path[0] = folder if is_module else str(Path(arguments[0]).parent)
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _warm_up() -> None:
    """Bring in all that a run imports. No backward pass: after one, a fork has no threads to do another."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    for name in ("deploypipe.pipeline", "deploypipe.cli", "deploypipe.release.bundle", "torch.distributed.run"):
        importlib.import_module(name)
    importlib.import_module("impatience").hurry()
    tiny = importlib.import_module("tiny_pipeline")
    structures = importlib.import_module("deploypipe.pruning.tracing.structures")
    export = importlib.import_module("deploypipe.export.onnx_export.export_onnx")
    model = tiny.Network().eval()
    inputs = tiny.images(2, seed=0)
    structures.list_structures(model, inputs[0])
    with TemporaryDirectory() as folder:
        export.export_onnx(model, [inputs], Path(folder) / "m.onnx", tiny.recipe().export)


def main() -> None:
    _warm_up()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
