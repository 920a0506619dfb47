"""Facts about the layout of each export target.

To add a target, add a row to TARGETS and the file `pipeline/export/<name>.py`. The file writes the layout, and defines
how it is read. Four places use TARGETS: the choices of `export.target`, the rules between settings, the size estimates
and the model card.
"""

from dataclasses import dataclass

from pipeline.numerics.formats import MXFP4, NVFP4


@dataclass(frozen=True)
class Target:
    """A layout that `export` writes.

    Attributes:
        holds: names of the formats that the layout can store.
        expert_bits: bits per expert weight on disk, including scales.
        title: description of the layout, as a part of a sentence in the model card.
        usage: commands that serve an export. {model} stands for the repository or directory of the export.
        tags: tags of the model card on the Hub.
        library: name of the library that loads the layout, as the Hub spells it, or None.
        fp32: parts of tensor names. A tensor is FP32 if its name in the plain layout contains one of these parts. All
            other tensors are BF16.
    """

    holds: tuple[str, ...]
    expert_bits: float
    title: str
    usage: str
    tags: tuple[str, ...]
    library: str | None = None
    fp32: tuple[str, ...] = ()

    @property
    def is_loadable(self) -> bool:
        """Whether transformers can load the layout."""
        return self.library == "transformers"

    def is_fp32(self, name: str) -> bool:
        """Return whether the layout stores a tensor in FP32. Do not call it for expert weights (see `expert_bits`)."""
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
        title="plain BF16 that holds the values of the 4-bit format, at four times the size",
        usage="vllm serve {model}",
        tags=("vllm",),
        library="transformers",
    ),
}
"""Map from the value of `export.target` to the layout."""


def advise_target(format_name: str) -> str:
    """Say which targets store a format. Without one, all stages but export can still run."""
    names = [name for name, target in TARGETS.items() if format_name in target.holds]
    if not names:
        return "Do not export: instead of stage=all, run the stages up to qat one by one, then stage=evaluate"
    return f"Set export.target={' or '.join(names)}"
