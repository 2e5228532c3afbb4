"""Starts `python -m training.train` in forked children of one process that has imported it all, so
that a test need not wait seconds for torch with every start.

Reads a JSON request a line from standard input and answers with one a line:
{"argv": [...], "env": {...}, "log": FILE} -> {"pid": N}, {"wait": N} -> {"status": N}, where a
status below 0 is the signal that ended it.
"""

import json
import os
import signal
import sys

import cv2
import matplotlib.backends.backend_agg
import matplotlib.figure
import PIL.Image
import torch._dynamo  # which the first step of an optimiser would import
import torch.utils.tensorboard

import training.train

sys.stdin.reconfigure(line_buffering=True)


def start(argv: list[str], env: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(env)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.argv = ["train", *argv]
        status = training.train.main(argv)
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    torch.set_num_threads(1)  # as OMP's threads would not survive a fork
    cv2.setNumThreads(0)
    PIL.Image.init()
    print(json.dumps({"ready": matplotlib.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": start(request["argv"], request["env"], request["log"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
