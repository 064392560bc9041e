"""Runs of the tiny pipeline in forked children that are killed: `killed_runs_server.py WEIGHTS`, then `FOLDER SECONDS`.

Importing torch takes seconds and is done once, here. After a fork no backward pass may have run in the parent.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny_pipeline as tiny
import torch
from safetensors.torch import load_file

from deploypipe.benchmark import memory
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.pipeline import compress
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.task import take_calib


def run(model: torch.nn.Module, folder: str) -> None:
    try:
        compress(model, tiny.load_data(), tiny.task(), tiny.recipe(), tiny.target(), folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    memory._NUM_CHILDREN = 1
    model = tiny.Network()
    model.load_state_dict(load_file(sys.argv[1]))
    model.eval()
    calib = take_calib(tiny.load_data().calib, 64)
    list_structures(model, calib[0][0])
    with TemporaryDirectory() as folder:  # brings in all that an export imports
        export_onnx(model, calib, Path(folder) / "m.onnx", tiny.recipe().export)
    print("ready", flush=True)
    for line in sys.stdin:
        folder, seconds = line.rsplit(maxsplit=1)
        child = os.fork()
        if child == 0:
            run(model, folder)
        deadline = time.monotonic() + float(seconds)
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
