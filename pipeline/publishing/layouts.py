"""Export targets as a person meets them on the Hub. A new target is one row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What the model card says of an export target.

    Attributes:
        name: in a sentence.
        usage: commands; {model} is its repository or directory.
        tags: that it is found by.
        library: what loads it, by its name on the Hub; None where the Hub knows none.
    """

    name: str
    usage: str
    tags: tuple[str, ...]
    library: str | None = None


LAYOUTS = {
    "mxfp4": Layout(
        "MXFP4 in the layout of the original: experts in 4 bits, everything else in BF16",
        "vllm serve {model}\nsglang serve --model-path {model}",
        ("mxfp4", "vllm"),
        "transformers",
    ),
    "openai": Layout(
        "MXFP4 in OpenAI's original layout, which its reference code (the package gpt-oss) loads",
        "python -m gpt_oss.generate {model}",
        ("mxfp4",),
    ),
    "nvfp4": Layout(
        "NVFP4: experts in 4 bits, everything else in BF16",
        "trtllm-serve {model}",
        ("nvfp4", "modelopt"),
    ),
    "gguf": Layout(
        "GGUF with experts in MXFP4, for llama.cpp, Ollama and LM Studio",
        "llama-server --jinja --model {model}/model.gguf",
        ("gguf", "mxfp4"),
    ),
    "bf16": Layout(
        "plain BF16, four times the size, with the values of the 4-bit format",
        "vllm serve {model}",
        ("vllm",),
        "transformers",
    ),
}
"""Layouts by export target."""
