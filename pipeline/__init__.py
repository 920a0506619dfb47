"""Fine-tune gpt-oss with quantization-aware training, and export it in the MXFP4 layout of the released model."""

__version__ = "0.1.0"

import os

# libgomp's threads spin for milliseconds while they wait for each other.
# Spinning makes arithmetic up to five times slower if there are more busy threads than cores. One extra is enough.
# This is common: conversions read, hash and write in parallel, and other users run programs.
# But threads that never spin make short loops a fifth slower. So threads spin here for about 50 microseconds.
# torch reads the variables when it is loaded, so they must be set before that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for other OpenMP libraries
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
