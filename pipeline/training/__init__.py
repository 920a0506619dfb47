"""One `train` for SFT and QAT, and what watches it.

It must not know whether the model has adapters or quantizers: it trains what it is given.
"""
