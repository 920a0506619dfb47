"""safetensors on disk: names and shapes of gpt-oss' tensors, shards, streaming.

It must not know what a checkpoint is for: no training, no forward pass, no export target.
"""
