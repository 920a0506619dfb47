"""Fine-tune gpt-oss, quantization-aware, and export it in the MXFP4 layout it was released in."""

__version__ = "0.1.0"

import os

# libgomp's threads spin while they wait for each other, for milliseconds. With one more busy thread than cores
# (conversions read, hash and write beside their arithmetic; other people work on the same machine) the arithmetic is
# then up to five times slower. Not spinning at all costs a fifth of the time of short loops; this is some 50
# microseconds. Read when torch is loaded, therefore here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # of other OpenMP libraries
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
