"""Run Python on a pretended GPU: on_pretended_gpu.py SCRIPT arguments…, or on_pretended_gpu.py -m MODULE arguments…"""

import os
import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

os.environ["TRITON_INTERPRET"] = "1"  # TRL's kernels then run on the CPU; Triton reads the variable at import

import torch  # noqa: E402
from pretended_gpu import gpu  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    is_module = sys.argv[1] == "-m"
    del sys.argv[: 2 if is_module else 1]
    with gpu():
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
