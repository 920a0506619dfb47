"""The engines: what each can read, and how its command says what is asked of it. A new engine is one row.

Flags are those of the engines' own documentation; none is written that the engine would take for granted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Engine:
    """A program with OpenAI's chat API.

    Attributes:
        command: its program, and what follows it.
        flags: value -> the flag that sets it, in the order of the command; "" for an argument without a flag. What is
            not here cannot be set.
        fixed: arguments that every export needs.
        targets: values of export.target that it reads.
        model_suffix: how the name of the file that it wants ends; "" where it wants the directory.
        health: path that answers 200 once a question can be asked.
        install: how to get it.
    """

    command: tuple[str, ...]
    flags: dict[str, str]
    targets: tuple[str, ...]
    install: str
    health: str = "/health"
    fixed: tuple[str, ...] = ()
    model_suffix: str = ""

    def arguments(self, program: str | None, values: dict[str, Any], extra: list[str]) -> list[str]:
        """The whole command; values that are None are left to the engine."""
        words = [program or self.command[0], *self.command[1:]]
        for name, flag in self.flags.items():
            if values[name] is not None:
                words += [flag, str(values[name])] if flag else [str(values[name])]
        return [*words, *self.fixed, *extra]

    def model_in(self, directory: Path, files: dict[str, int]) -> Path:
        """What it is to load of an export: the directory, or the one file that it reads."""
        if not self.model_suffix:
            return directory
        (name,) = (name for name in files if name.endswith(self.model_suffix))
        return directory / name


ENGINES = {
    # docs.vllm.ai, "vllm serve"; the tool parser: vLLM's recipe OpenAI/GPT-OSS.md. It parses the channels unasked.
    "vllm": Engine(
        command=("vllm", "serve"),
        flags={
            "model": "",
            "name": "--served-model-name",
            "host": "--host",
            "port": "--port",
            "tensor_parallel_size": "--tensor-parallel-size",
            "context_length": "--max-model-len",
            "gpu_memory_fraction": "--gpu-memory-utilization",
        },
        fixed=("--enable-auto-tool-choice", "--tool-call-parser", "openai"),
        targets=("mxfp4", "bf16"),
        install="pip install vllm",
    ),
    # docs.sglang.io, "Server Arguments"; the parsers: "Reasoning Parser" and "Tool Parser" there.
    "sglang": Engine(
        command=("sglang", "serve"),
        flags={
            "model": "--model-path",
            "name": "--served-model-name",
            "host": "--host",
            "port": "--port",
            "tensor_parallel_size": "--tp-size",
            "context_length": "--context-length",
            "gpu_memory_fraction": "--mem-fraction-static",
        },
        fixed=("--reasoning-parser", "gpt-oss", "--tool-call-parser", "gpt-oss"),
        targets=("mxfp4", "bf16"),
        install='pip install "sglang[all]"',
    ),
    # NVIDIA's "Deployment Guide for GPT-OSS on TensorRT-LLM", and the options of tensorrt_llm/commands/serve.py. The
    # reading of BF16 and MXFP4: tensorrt_llm/_torch/models/modeling_gpt_oss.py.
    "tensorrt_llm": Engine(
        command=("trtllm-serve",),
        flags={
            "model": "",
            "host": "--host",
            "port": "--port",
            "tensor_parallel_size": "--tp_size",
            "context_length": "--max_seq_len",
            "gpu_memory_fraction": "--kv_cache_free_gpu_memory_fraction",
        },
        targets=("mxfp4", "nvfp4", "bf16"),
        install="pip install tensorrt_llm, or NVIDIA's container nvcr.io/nvidia/tensorrt-llm/release",
    ),
    # tools/server/README.md of llama.cpp. It spreads layers over all GPUs by itself.
    "llama_cpp": Engine(
        command=("llama-server",),
        flags={
            "model": "--model",
            "name": "--alias",
            "host": "--host",
            "port": "--port",
            "context_length": "--ctx-size",
        },
        fixed=("--jinja",),
        targets=("gguf",),
        model_suffix=".gguf",
        install="brew install llama.cpp, or from https://github.com/ggml-org/llama.cpp",
    ),
    # `python -m llama_cpp.server --help`. It has no route for its health, but loads its model before it listens.
    "llama_cpp_python": Engine(
        command=("python", "-m", "llama_cpp.server"),
        flags={
            "model": "--model",
            "name": "--model_alias",
            "host": "--host",
            "port": "--port",
            "context_length": "--n_ctx",
        },
        targets=("gguf",),
        model_suffix=".gguf",
        health="/v1/models",
        install='pip install "llama-cpp-python[server]"',
    ),
}
"""Engines by name."""
