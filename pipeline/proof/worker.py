"""Run by an engine's own Python: load a checkpoint, write the log-probabilities of the next token, and say the version.

    <python> worker.py <engine> <checkpoint> <request.json> <result.npy>

The request is {"prompts": [[ids]], "dtype": "float32"}, the result (prompts, vocabulary) float32. Nothing else of this
program is imported, as an engine's environment does not have it. Exit status 3: the engine is not installed there.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3

Prompts = list[list[int]]


def transformers(checkpoint: str, prompts: Prompts, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if "quantization_config" in json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")):
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **arguments).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]).numpy()


def openai(checkpoint: str, prompts: Prompts, dtype: str) -> Any:
    import torch
    from gpt_oss.torch.model import Transformer

    model = Transformer.from_checkpoint(checkpoint, device="cpu").to(getattr(torch, dtype))
    with torch.no_grad():
        return torch.stack([model(torch.tensor(ids))[-1].float() for ids in prompts]).numpy()


def llama_cpp(checkpoint: str, prompts: Prompts, dtype: str) -> Any:
    import numpy
    from llama_cpp import Llama

    (path,) = Path(checkpoint).glob("*.gguf")
    longest = max(map(len, prompts))
    # Its cache of keys and values is FP16 unless it is told otherwise; 0 is ggml's number for F32.
    kinds = {"type_k": 0, "type_v": 0} if dtype == "float32" else {}
    llama = Llama(str(path), n_ctx=longest + 8, n_batch=longest, logits_all=True, verbose=False, **kinds)
    logits = []
    for ids in prompts:
        llama.reset()
        llama.eval(ids)
        logits.append(numpy.array(llama.scores[len(ids) - 1], dtype=numpy.float32))
    return numpy.stack(logits)


def mlx(checkpoint: str, prompts: Prompts, dtype: str) -> Any:
    import mlx.core as mx
    import numpy
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(checkpoint))
    model.set_dtype(getattr(mx, dtype))
    logits = [model(mx.array([ids]))[0, -1].astype(mx.float32) for ids in prompts]
    return numpy.stack([numpy.array(each) for each in logits])


def vllm(checkpoint: str, prompts: Prompts, dtype: str) -> Any:
    import numpy

    # In this process, on however many cores there are, and without a word to anyone.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + 8,
        max_num_seqs=2,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    found = [answer.outputs[0].logprobs[0] for answer in answers]
    return numpy.array([[of_token[i].logprob for i in range(len(of_token))] for of_token in found], numpy.float32)


ENGINES: dict[str, tuple[str, str, Callable[[str, Prompts, str], Any]]] = {
    "transformers": ("transformers", "transformers", transformers),
    "openai": ("gpt_oss", "gpt-oss", openai),
    "llama_cpp": ("llama_cpp", "llama-cpp-python", llama_cpp),
    "mlx": ("mlx_lm", "mlx-lm", mlx),
    "vllm": ("vllm", "vllm", vllm),
}
"""Engine -> the module whose absence means that it is not installed, its distribution, and what it computes."""


def version(module: str, distribution: str) -> str:
    """Of the distribution that holds the module: a rebuild has a name of its own."""
    names = importlib.metadata.packages_distributions().get(module) or [distribution]
    return f"{names[0]} {importlib.metadata.version(names[0])}"


def main(engine: str, checkpoint: str, request: str, result: str) -> int:
    """Raises whatever the engine raises."""
    module, distribution, compute = ENGINES[engine]
    if importlib.util.find_spec(module) is None:
        return NOT_INSTALLED
    import numpy

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    logits = numpy.asarray(compute(checkpoint, asked["prompts"], asked["dtype"]), dtype=numpy.float64)
    largest = logits.max(-1, keepdims=True)
    shares = numpy.exp(logits - largest)
    numpy.save(result, (logits - largest - numpy.log(shares.sum(-1, keepdims=True))).astype(numpy.float32))
    Path(result).with_suffix(".version").write_text(version(module, distribution), encoding="utf-8")
    return 0


if __name__ == "__main__":
    # The folder of this file comes first, and its names would hide an engine's.
    sys.path.remove(str(Path(__file__).resolve().parent))
    sys.exit(main(*sys.argv[1:]))
