"""Saves a tiny model with adapters and quantizers in the directory that the command line names.

The last line of the output is a hash, which tells the hash seeds of two processes apart.
"""

import sys
from pathlib import Path

import torch
import transformers

from pipeline.config import LoraConfig, Method, QatConfig
from pipeline.models import adapters, fake_quantizers, saving
from pipeline.numerics.formats import MXFP4


def save(directory: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 1}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(vocab_size=64, **sizes, **heads))
    adapted = adapters.attach(model, QatConfig(method=Method.lora, lora=LoraConfig(rank=2)), "qat")
    fake_quantizers.insert(adapted, MXFP4, lambda quantized: quantized(input_ids=torch.arange(8).view(1, 8)))
    fake_quantizers.save_state(adapted, directory)
    saving.save_adapters(adapted, directory, directory)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
    print(hash("a text"))
