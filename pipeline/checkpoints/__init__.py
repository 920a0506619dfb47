"""Reads and writes gpt-oss checkpoints: names and shapes of their tensors, safetensors shards, streaming.

This package must not know the use of a checkpoint: no training, no forward pass, no export target.
"""
