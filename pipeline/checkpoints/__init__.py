"""safetensors on disk: gpt-oss' names and shapes, shards, streaming.

It must not know what a checkpoint is for: no training, no forward pass, no export target.
"""
