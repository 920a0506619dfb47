"""`serve`: an engine that serves the verified export."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import BETWEEN_0_AND_1, NOT_EMPTY, POSITIVE, Bound
from pipeline.config.choices import add_members
from pipeline.config.engines import SERVERS

_PORT = Bound("a port: a whole number from 1 to 65535", lambda value: 0 < value < 2**16)


class ServingEngine(Enum):
    """Engines that `serve` can start: the rows of SERVERS."""

    add_members(vars(), SERVERS)


@dataclass
class ServeConfig:
    """Start an engine on the verified export, ask it one question, and keep it running."""

    engine: ServingEngine = ServingEngine["vllm"]
    """Engine. vllm, sglang and tensorrt_llm need GPUs; llama_cpp (llama-server) and llama_cpp_python a gguf export."""
    program: Annotated[Optional[str], NOT_EMPTY] = None
    """Executable of the engine, such as /opt/vllm/bin/vllm (llama_cpp_python: its Python); null: from the PATH."""
    host: Annotated[str, NOT_EMPTY] = "127.0.0.1"
    """Address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for the whole network. No key is required."""
    port: Annotated[int, _PORT] = 8000
    """Port to listen on."""
    tensor_parallel_size: Annotated[Optional[int], POSITIVE] = None
    """Number of GPUs that share each layer; must divide heads and experts. null: as many visible GPUs as fit."""
    context_length: Annotated[Optional[int], POSITIVE] = None
    """Longest conversation in tokens. It sets the size of the KV cache. null: the engine's default."""
    gpu_memory_fraction: Annotated[Optional[float], BETWEEN_0_AND_1] = None
    """Share of GPU memory to use (tensorrt_llm: of the memory that weights leave free); null: the engine's default."""
    extra_arguments: list[str] = field(default_factory=list)
    """Arguments appended to the engine's command: [--max-num-seqs, 64]."""
    question: Annotated[str, NOT_EMPTY] = "What is 12 + 7?"
    """Question to ask when the engine is ready. data.reasoning_effort applies."""
    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Longest answer to the question in tokens, reasoning included."""
    startup_seconds: Annotated[float, POSITIVE] = 1800.0
    """Longest time for the engine to load weights and compile kernels, in seconds."""
    answer_seconds: Annotated[float, POSITIVE] = 300.0
    """Longest time for the answer, in seconds."""
    once: bool = False
    """Stop after the answer."""
    dry_run: bool = False
    """Only print the engine's command as one shell line, for this machine or another."""
    verified_only: bool = True
    """Refuse to serve an export that stage=verify has not passed."""
