"""Fine-tune gpt-oss with quantization-aware training, and export it in the MXFP4 layout of its release."""

__version__ = "0.1.0"

import os

# libgomp's threads spin for milliseconds while they wait for each other. With one more busy thread than cores, the
# arithmetic is then up to five times slower: conversions read, hash and write beside it, and other people use the
# machine. Threads that never spin slow short loops down by a fifth. This setting spins for about 50 microseconds.
# The variables are read when torch is loaded, so they are set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for other OpenMP libraries
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
