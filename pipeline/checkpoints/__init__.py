"""Reads and writes gpt-oss checkpoints: defines the names and shapes of their tensors, and streams safetensors shards.

This package must not know what checkpoints are used for, such as training, a forward pass or an export target.
"""
