"""A program that loads a checkpoint in an engine and writes predictions. It runs in the Python of the engine.

    <python> worker.py <engine> <checkpoint> <request.json> <result.npy>

The request is {"module": "…", "distribution": "…", "prompts": [[ids]], "tokens": 0, "dtype": "float32"}. `distribution`
is the name of the engine's package. If Python does not find `module`, the engine is not installed and the exit status
is 3.

result.npy contains log-probabilities of the next token: float32, shape (prompts, vocabulary). result.json is in the
same folder. It contains {"version": "…", "generated": [[ids]]}. `generated` has one list for each prompt: the ids of
`tokens` tokens, which were decoded greedily.

This file imports no other file of the pipeline, because the environments of engines do not contain the pipeline.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

NOT_INSTALLED = 3

Prompts = list[list[int]]
Predict = Callable[[Prompts], "numpy.ndarray"]
"""A function that takes prompts.

It returns logits or log-probabilities of the next token, shape (prompts, vocabulary).
"""


def transformers(checkpoint: str, longest: int, dtype: str) -> Predict:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if "quantization_config" in json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")):
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **arguments).to(getattr(torch, dtype)).eval()

    @torch.no_grad()
    def predict(prompts: Prompts) -> "numpy.ndarray":
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]).numpy()

    return predict


def openai(checkpoint: str, longest: int, dtype: str) -> Predict:
    import torch
    from gpt_oss.torch.model import Transformer

    model = Transformer.from_checkpoint(checkpoint, device="cpu").to(getattr(torch, dtype))

    @torch.no_grad()
    def predict(prompts: Prompts) -> "numpy.ndarray":
        return torch.stack([model(torch.tensor(ids))[-1].float() for ids in prompts]).numpy()

    return predict


def llama_cpp(checkpoint: str, longest: int, dtype: str) -> Predict:
    import numpy
    from llama_cpp import Llama

    (path,) = Path(checkpoint).glob("*.gguf")
    # The default type of the key-value cache is FP16. ggml's number for F32 is 0.
    kinds = {"type_k": 0, "type_v": 0} if dtype == "float32" else {}
    llama = Llama(str(path), n_ctx=longest + 8, n_batch=longest, logits_all=True, verbose=False, **kinds)

    def predict_one(ids: list[int]) -> "numpy.ndarray":
        llama.reset()
        llama.eval(ids)
        return numpy.array(llama.scores[len(ids) - 1], dtype=numpy.float32)

    return lambda prompts: numpy.stack([predict_one(ids) for ids in prompts])


def mlx(checkpoint: str, longest: int, dtype: str) -> Predict:
    import mlx.core as mx
    import numpy
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(checkpoint))
    model.set_dtype(getattr(mx, dtype))

    def predict_one(ids: list[int]) -> "numpy.ndarray":
        return numpy.array(model(mx.array([ids]))[0, -1].astype(mx.float32))

    return lambda prompts: numpy.stack([predict_one(ids) for ids in prompts])


def vllm(checkpoint: str, longest: int, dtype: str) -> Predict:
    import numpy

    # Run in one process, do not bind threads to cores, and send no usage statistics.
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
        max_model_len=longest + 8,
        max_num_seqs=2,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)

    def predict(prompts: Prompts) -> "numpy.ndarray":
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        found = [answer.outputs[0].logprobs[0] for answer in answers]
        return numpy.array([[of_token[i].logprob for i in range(len(of_token))] for of_token in found], numpy.float32)

    return predict


LOADERS: dict[str, Callable[[str, int, str], Predict]] = {
    "transformers": transformers,
    "openai": openai,
    "llama_cpp": llama_cpp,
    "mlx": mlx,
    "vllm": vllm,
}
"""Loader of each engine.

It takes the checkpoint, the largest number of positions and the data type. It returns a function that predicts.
"""


def version(module: str, distribution: str) -> str:
    """Return the name and version of the installed package that has the module.

    For some builds of an engine, the package's name differs from `distribution`.
    """
    names = importlib.metadata.packages_distributions().get(module) or [distribution]
    return f"{names[0]} {importlib.metadata.version(names[0])}"


def main(engine: str, checkpoint: str, request: str, result: str) -> int:
    """Run an engine, write its results, and return the exit status. Exceptions of the engine are not caught."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    if importlib.util.find_spec(asked["module"]) is None:
        return NOT_INSTALLED
    import numpy

    prompts, tokens = asked["prompts"], asked["tokens"]
    predict = LOADERS[engine](checkpoint, max(map(len, prompts)) + tokens, asked["dtype"])
    logits = numpy.asarray(predict(prompts), dtype=numpy.float64)
    largest = logits.max(-1, keepdims=True)
    shares = numpy.exp(logits - largest)
    numpy.save(result, (logits - largest - numpy.log(shares.sum(-1, keepdims=True))).astype(numpy.float32))
    told = {
        "version": version(asked["module"], asked["distribution"]),
        "generated": generate(predict, prompts, tokens),
    }
    Path(result).with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")
    return 0


def generate(predict: Predict, prompts: Prompts, tokens: int) -> Prompts:
    """Decode greedily after each prompt. Return the ids of the new tokens, `tokens` for each prompt."""
    texts = [list(ids) for ids in prompts]
    for _ in range(tokens):
        for ids, each in zip(texts, predict(texts), strict=True):
            ids.append(int(each.argmax()))
    return [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]


if __name__ == "__main__":
    # Python puts the folder of this file first in sys.path. Modules in this folder would hide modules of engines.
    sys.path.remove(str(Path(__file__).resolve().parent))
    sys.exit(main(*sys.argv[1:]))
