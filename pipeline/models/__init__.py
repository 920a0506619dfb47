"""A model between disk and forward pass: references, loading, saving, adapters, quantizers, sharding.

It must not know which stage asks, nor how a model is trained, scored or exported.
"""
