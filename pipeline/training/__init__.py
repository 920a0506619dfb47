"""Train models for SFT and QAT, with callbacks for metrics and checkpoints.

This package must not know whether a model has adapters or quantizers. It trains all parameters that require gradients.
"""
