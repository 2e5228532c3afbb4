"""Every benchmark of an op on the GPU, one after the other, and what they printed in one file.

python -m benchmarks.gpu_kernels [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import traceback
from collections.abc import Sequence
from pathlib import Path

from yolov4_fast.files import replacing

MODULES = ("resize", "convolution", "mish_bn", "pool", "upsample", "decode", "diou_nms")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    arguments = parser.parse_args(argv)
    printed, failed = [], []
    for name in MODULES:
        sink = io.StringIO()
        try:
            with contextlib.redirect_stdout(sink):
                importlib.import_module(f"benchmarks.bench_{name}").main(gpu_only=True)
        except Exception:  # shown, counted, and the others go on
            sink.write(traceback.format_exc())
            failed.append(name)
        printed.append(sink.getvalue())
        print(printed[-1], flush=True)
    if arguments.output:
        with replacing(arguments.output) as temporary:
            temporary.write_text("\n".join(printed))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
