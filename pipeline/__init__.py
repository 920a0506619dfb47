"""Fine-tune gpt-oss, quantization-aware, and export it in the MXFP4 layout it was released in."""

__version__ = "0.1.0"
