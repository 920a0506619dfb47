"""Training for SFT and QAT, with callbacks for metrics and checkpoints.

It must not know whether the model has adapters or quantizers: it trains what it is given.
"""
