"""Find, load, shard and save models, and attach adapters and quantizers to them.

This package must not know which stage calls it, nor how a model is trained, scored or exported.
"""
