"""Settings of `serve`: the engine that serves the verified export."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import BETWEEN_0_AND_1, POSITIVE, Bound
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
    """Engine to start. llama_cpp (llama-server) and llama_cpp_python need a gguf export. The others need GPUs."""
    program: Optional[str] = None
    """Path of the engine's executable; null: search the PATH. For llama_cpp_python, give the path of its Python."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 (this machine only) or 0.0.0.0 (the network). Clients need no API key."""
    port: Annotated[int, _PORT] = 8000
    """Port to listen on."""
    tensor_parallel_size: Annotated[Optional[int], POSITIVE] = None
    """Number of GPUs that share each layer. It must divide the counts of heads and experts; null: the largest."""
    context_length: Annotated[Optional[int], POSITIVE] = None
    """Largest length of a conversation in tokens. The KV cache grows with it. null: the engine's default."""
    gpu_memory_fraction: Annotated[Optional[float], BETWEEN_0_AND_1] = None
    """Share of GPU memory to use (tensorrt_llm: of the memory that weights leave free); null: the engine's default."""
    extra_arguments: list[str] = field(default_factory=list)
    """Arguments to append to the engine's command, such as [--max-num-seqs, 64]."""
    question: str = "What is 12 + 7?"
    """Question to ask when the engine is ready. The model uses data.reasoning_effort."""
    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Largest length of the answer in tokens, including the reasoning."""
    startup_seconds: Annotated[float, POSITIVE] = 1800.0
    """Time limit for the engine to load weights and compile kernels, in seconds."""
    answer_seconds: Annotated[float, POSITIVE] = 300.0
    """Time limit for the answer, in seconds."""
    once: bool = False
    """Stop the engine after the answer, instead of keeping it running."""
    dry_run: bool = False
    """Only print the engine's command, as one shell line. You can also run it on another machine."""
    verified_only: bool = True
    """Refuse to serve an export that has not passed stage=verify."""
