"""Checks an export in the engines of LIBRARIES. Each engine loads the export in its own process and predicts tokens.

The expected prediction comes from transformers, which runs the base model with the trained values. If only the export
is known, independent code decodes the trained values from the export.

The measure is the divergence of the engine's prediction q from the expected prediction p: the sum of p log(p / q) over
the vocabulary, in nats. In FP32, the worst prompt decides. In BF16, the median prompt decides.

Largest divergence of a correct engine in FP32 (`nats` in LIBRARIES):

    transformers, openai, vllm    1e-6. They do the same arithmetic in another order. Their log-probabilities agree to
                                  3e-6.
    mlx                           1e-5. It uses fused kernels for MXFP4 and attention.
    llama_cpp                     2e-2. ggml rounds activations to 8 bits before it multiplies them with MXFP4. A tiny
                                  random model diverges by 1e-3 to 7e-3, and a trained model by less.

In BF16 (`model.dtype`) each sum is rounded to 8 bits. If two experts are nearly tied, rounding may change the router's
choice. Then the prediction after a single prompt diverges far, although nothing is wrong.

In the table, transformers makes both predictions. One column compares BF16 with FP32. The other column compares two
predictions in BF16. The two predictions differ in the order of sums in the experts. The first model is the tiny model
after the short training of `smoke`. The other models are random, with 8 layers, hidden size 768, 16 experts and the
released vocabulary. The number in parentheses is the standard deviation of their logits.

    nats, median / worst     positions   BF16 and FP32        BF16, experts in another order of sums
    tiny, trained            2112        5e-5 / 2.3e-2        2e-5 / 2.1e-2
    8 layers, random (1.0)   144         3e-3 / 3.4e-2        5e-4 / 3.6e-2
    8 layers, random (4.4)   144         5e-2 / 7.5e-1        1e-2 / 8.3e-1

In the last row, the median prompt diverges from FP32 by 5e-2. If two engines diverge from FP32 by 5e-2 each, they may
diverge from each other by 1e-1. So in BF16 the tolerance at the median prompt is 1e-1 for every engine. This tolerance
is a judgement. It assumes that random models are the worst case. No released model has been measured. The check in FP32
is much stricter.

llama.cpp and mlx-lm round the bounds of YaRN's correction range and ignore `rope_scaling.truncate`. The rounding alone
changes logits, so these engines are compared with a reference that also rounds the bounds.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.engines import ENGINES, LIBRARIES, loading_problems
from pipeline.data.harmony import IGNORED
from pipeline.errors import user_errors
from pipeline.models import loading
from pipeline.models.weights import Weights
from pipeline.runs import allocator
from pipeline.runs.console import say
from pipeline.runs.processes import environment_with_all_cores
from pipeline.verify import worker
from pipeline.verify.check import Check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Expected = Callable[[bool], Tensor]
"""A function that takes `rounds_yarn` and returns log-probabilities of shape (prompts, vocabulary).

rounds_yarn: whether the bounds of YaRN's correction range are rounded.
"""

_BF16_NATS = 1e-1
_LONGEST = 512  # positions of a prompt, at most
_LINES = 12  # number of lines shown from the end of a failed engine's output


@dataclass(frozen=True)
class Trial:
    """The input of an engine.

    Attributes:
        directory: directory of the export.
        target: layout of the export.
        prompts: token ids of each prompt.
        dtype: data type of the computation.
        seconds: time limit, after which the engine is killed.
        tokens: number of tokens to generate after each prompt.
    """

    directory: Path
    target: str
    prompts: list[list[int]]
    dtype: torch.dtype
    seconds: float
    tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """The output of an engine. Every field is empty if the engine is not installed.

    Attributes:
        version: version of the engine, or None if it is not installed or failed.
        log_probabilities: shape (prompts, vocabulary), or None.
        failure: description of the failure and the end of the engine's output, or None.
        generated: generated token ids of each prompt.
    """

    version: str | None = None
    log_probabilities: Tensor | None = None
    failure: str | None = None
    generated: Sequence[list[int]] = ()


def engines_for(target: str) -> list[str]:
    """Return the engines of LIBRARIES that load a layout."""
    return [name for name in LIBRARIES if target in ENGINES[name].targets]


def raise_unless_loadable(engines: list[str], target: str, pythons: dict[str, str | None]) -> None:
    """Check that each engine loads the layout, and that its Python exists.

    Raises:
        UserError: an engine does not load the layout, or its Python does not exist. All problems are reported together.
    """
    wrong = loading_problems(engines, target, pythons)
    if wrong:
        raise user_errors(wrong)


def check_engine(name: str, python: str | None, trial: Trial, expected: Expected) -> Check:
    """Check the export in one engine.

    An engine that is not installed is reported as not checked. An engine that fails or exceeds the time limit is
    reported as a problem.
    """
    check, engine = (
        Check(f"{name}: loads the export, and its predictions agree with the trained model's"),
        LIBRARIES[name],
    )
    say("verify", f"{name}: loading the export")
    answer = ask(name, python or sys.executable, trial)
    if answer.version is None and answer.failure is None:
        check.skipped = f"not installed for {python or sys.executable} ({engine.install}; set verify.python.{name})"
    elif answer.log_probabilities is None:
        check.problems.append(f"{name} failed: {answer.failure}")
    else:
        check.measured = {
            "version": answer.version,
            **measure_divergence(answer.log_probabilities, expected(engine.rounds_yarn)),
        }
        is_sharp = trial.dtype is torch.float32
        prompt, allowed = ("worst", engine.nats) if is_sharp else ("median", max(engine.nats, _BF16_NATS))
        nats = check.measured["nats" if is_sharp else "median_nats"]
        check.measured["tolerance"] = allowed
        if not nats <= allowed:  # also true for NaN
            check.problems.append(
                f"{name} predicts other tokens than the trained model: the divergence at the {prompt} prompt is"
                f" {nats:.3g} nats, more than {allowed:.3g}"
            )
    return check


def ask(name: str, python: str, trial: Trial) -> Answer:
    """Run an engine in its own process group, which is killed after the time limit."""
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        request, result = Path(scratch) / "request.json", Path(scratch) / "result.npy"
        dtype = str(trial.dtype).removeprefix("torch.")
        library = LIBRARIES[name]
        asked = {
            "module": library.module,
            "distribution": library.distribution,
            "prompts": trial.prompts,
            "tokens": trial.tokens,
            "dtype": dtype,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        command = [python, str(Path(worker.__file__).resolve()), name, str(trial.directory), str(request), str(result)]
        output = Path(scratch) / "output.txt"
        status = _run(command, trial.seconds, output)
        if status == worker.NOT_INSTALLED:
            return Answer()
        if status is None:
            return Answer(failure=f"no answer within verify.engine_seconds={trial.seconds:g}. {_end(output)}")
        if status or not result.is_file():
            return Answer(failure=f"exit status {status}. {_end(output)}")
        told = json.loads(result.with_suffix(".json").read_text(encoding="utf-8"))
        return Answer(told["version"], torch.from_numpy(np.load(result)), generated=told["generated"])


def _run(command: list[str], seconds: float, output: Path) -> int | None:
    """Run a command. Return its exit status, or None if it takes longer than `seconds`.

    The output goes to a file, because a pipe would stay open until the last child process of the engine ends.
    """
    environment = {**allocator.without_our_setting(environment_with_all_cores()), "HF_HUB_OFFLINE": "1"}
    with output.open("wb") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also ends the engine if the check is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end(output: Path) -> str:
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()][-_LINES:]
    return "Its last lines:\n" + "\n".join(f"    {line}" for line in lines) if lines else "It wrote nothing."


def measure_divergence(have: Tensor, want: Tensor) -> dict[str, float]:
    """Measure the divergence of an engine's prediction from the expected one.

    Args:
        have: the engine's log-probabilities, shape (prompts, vocabulary). The vocabulary may lack the padding rows of
            the embedding, which follow the last real token.
        want: expected log-probabilities, shape (prompts, vocabulary).

    Returns:
        The divergence at the worst prompt and at the median prompt, the largest difference of log-probabilities, and
        the share of prompts with the same likeliest token. Both divergences are NaN if the divergence of any prompt is
        not finite.
    """
    q, p = have.double()[:, : want.shape[1]], want.double()[:, : have.shape[1]]
    nats = (p.exp() * (p - q)).sum(-1)
    is_finite = bool(nats.isfinite().all())
    return {
        "nats": max(0.0, float(nats.max())) if is_finite else float("nan"),
        "median_nats": max(0.0, float(nats.quantile(0.5))) if is_finite else float("nan"),
        "largest_difference": float((p - q).abs().max()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "prompts": len(p),
    }


def prompts(examples: Iterable[Mapping[str, Sequence[int]]]) -> list[list[int]]:
    """Return two prompts for each conversation.

    The first prompt ends before the answer, the second in the middle of the answer.
    """
    found = []
    for example in examples:
        ids, labels = list(example["input_ids"])[:_LONGEST], list(example["labels"])[:_LONGEST]
        first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids) - 1)
        found += [ids[:first], ids[: (first + len(ids)) // 2]]
    return [ids for ids in found if ids]


def reference(base: Path, weights: Callable[[str], Tensor], dtype: torch.dtype) -> Callable[[bool], "PreTrainedModel"]:
    """Return a function that loads the base model in transformers with other weights.

    The function takes `rounds_yarn` (see `Expected`) and returns the model.

    Args:
        base: directory of the base model.
        weights: function that maps a name in the plain layout to the tensor's values. Experts are (E, in, out).
        dtype: data type of the computation.
    """

    @cache
    def model(rounds_yarn: bool) -> "PreTrainedModel":
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base)
        config.rope_parameters["truncate"] = rounds_yarn or config.rope_parameters.get("truncate", True)
        made = loading.load_plain(base, dtype, config=config, experts_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(weights(name))
        return made

    return model


@torch.no_grad()
def predict(model: "PreTrainedModel", prompts: list[list[int]]) -> Tensor:
    """Compute log-probabilities of the next token, shape (prompts, vocabulary)."""
    logits = [model(torch.tensor([ids])).logits[0, -1].double() for ids in prompts]
    return torch.stack(logits).log_softmax(-1)


def expectation(base: Path, weights: Callable[[str], Tensor], trial: Trial) -> Expected:
    """Return a function that computes the reference model's predictions for the prompts of a trial.

    The function takes `rounds_yarn` (see `Expected`). `base` and `weights` are the same as in `reference`.
    """
    model = reference(base, weights, trial.dtype)
    return cache(lambda rounds_yarn: predict(model(rounds_yarn), trial.prompts))


def values_of_training(weights: Weights) -> Callable[[str], Tensor]:
    """Return a function that reads the values that an export stores for a trained tensor.

    Weights of experts are quantized. Other tensors are rounded to BF16.
    """
    return lambda name: weights.read_effective(name).to(torch.bfloat16)
