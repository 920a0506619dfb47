"""Reads and writes gpt-oss checkpoints: defines the names and shapes of their tensors, and streams safetensors shards.

This package must not depend on code that uses checkpoints, such as training, the forward pass or export targets.
"""
