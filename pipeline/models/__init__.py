"""Find, load, shard and save models, and attach adapters and quantizers to them.

This package must not know which stage calls it. It must not know how a model is trained, scored or exported.
"""
