"""Export targets: the facts about each layout. A new target is one row of TARGETS and one file.

The file is `pipeline/export/<name>.py`. It writes the layout and defines how to read it. The choices of
`export.target`, the rules between settings, size estimates and the model card derive from the rows.
"""

from dataclasses import dataclass

from pipeline.numerics.formats import MXFP4, NVFP4


@dataclass(frozen=True)
class Target:
    """A layout that `export` writes.

    Attributes:
        holds: names of the formats that the layout can store.
        expert_bits: bits per expert weight on disk, including scales.
        title: description of the layout, part of a sentence of the model card.
        usage: commands that serve an export. {model} is its repository or directory.
        tags: tags on the Hub.
        library: the Hub's name of the library that loads the layout, or None.
        fp32: parts of tensor names. Tensors with such a name in the plain layout are FP32. Other tensors are BF16.
    """

    holds: tuple[str, ...]
    expert_bits: float
    title: str
    usage: str
    tags: tuple[str, ...]
    library: str | None = None
    fp32: tuple[str, ...] = ()

    def is_fp32(self, name: str) -> bool:
        """Whether the layout stores a tensor in FP32. Expert weights have `expert_bits` instead."""
        return any(part in name for part in self.fp32)


TARGETS = {
    "mxfp4": Target(
        holds=("mxfp4",),
        expert_bits=MXFP4.bits_per_value,
        title="MXFP4 in the layout of the original: experts in 4 bits, everything else in BF16",
        usage="vllm serve {model}\nsglang serve --model-path {model}",
        tags=("mxfp4", "vllm"),
        library="transformers",
    ),
    "openai": Target(
        holds=("mxfp4",),
        expert_bits=MXFP4.bits_per_value,
        title="MXFP4 in OpenAI's original layout, which its reference code (the package gpt-oss) loads",
        usage="python -m gpt_oss.generate {model}",
        tags=("mxfp4",),
    ),
    "nvfp4": Target(
        holds=("nvfp4", "nvfp4_w4a4", "mxfp4"),
        expert_bits=NVFP4.bits_per_value,
        title="NVFP4: experts in 4 bits, everything else in BF16",
        usage="trtllm-serve {model}",
        tags=("nvfp4", "modelopt"),
    ),
    "gguf": Target(
        holds=("mxfp4",),
        expert_bits=MXFP4.bits_per_value,
        title="GGUF with experts in MXFP4, for llama.cpp, Ollama and LM Studio",
        usage="llama-server --jinja --model {model}/model.gguf",
        tags=("gguf", "mxfp4"),
        fp32=("bias", "norm", "sinks", "router"),  # vectors and the router, as in llama.cpp's converter
    ),
    "bf16": Target(
        holds=("mxfp4", "nvfp4"),
        expert_bits=16,
        title="plain BF16, four times the size, with the values of the 4-bit format",
        usage="vllm serve {model}",
        tags=("vllm",),
        library="transformers",
    ),
}
"""Value of `export.target` -> its layout."""
