"""Fine-tune gpt-oss, quantization-aware, and export it in the MXFP4 layout it was released in."""

__version__ = "0.1.0"

import os

# libgomp's threads spin while they wait for each other. With one more busy thread than cores (conversions read, hash
# and write beside their arithmetic; other people work on the same machine) the arithmetic is then up to five times
# slower. Read when torch is loaded, therefore here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
