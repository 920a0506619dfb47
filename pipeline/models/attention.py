"""Choose the attention implementation: resolve `attn_implementation=auto` for a device."""

import importlib.util
import os

import torch

from pipeline.config import AUTO_ATTENTION, Precision, TrainConfig

EAGER = "eager"
FLEX = "flex_attention"
FUSED_SINKS = "fused_sinks"
"""Name of `pipeline.models.sink_attention` in transformers.

The name contains neither "flash" nor "sdpa". For a name with "flash", transformers 5.14 would load a kernel from its
hub instead. It refuses names with "sdpa" for gpt-oss.
"""

_FUSED_CAPABILITY = (8, 0)  # lowest compute capability that has torch's flash kernel and BF16

Capability = tuple[int, int]


def device() -> torch.device:
    """Return the device that this process trains on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def capability() -> Capability | None:
    """Return the compute capability of this process' GPU, or None if it has no GPU."""
    return torch.cuda.get_device_capability(device()) if torch.cuda.is_available() else None


def candidates(dtype: torch.dtype, gpu: Capability | None, *, packing: bool = False) -> tuple[str, ...]:
    """Return the implementations that `auto` may choose, the best first. The last one is eager.

    On a CPU, eager is the best one. Its results have the same bits as the results of transformers. Packed documents are
    an exception: eager computes the scores between all tokens of a row. This takes many times longer than the scores
    within each document. So `fused_sinks` is the best one for packed documents.

    Args:
        dtype: type that attention is computed in.
        gpu: compute capability of the GPU, or None for a CPU.
        packing: whether several documents are packed into a row.
    """
    if gpu is None:
        return (FUSED_SINKS, EAGER) if packing else (EAGER,)
    fused = (FUSED_SINKS,) if dtype is torch.bfloat16 and gpu >= _FUSED_CAPABILITY else ()
    flex = (FLEX,) if importlib.util.find_spec("triton") is not None else ()
    return (*fused, *flex, EAGER)


def for_training(train: TrainConfig, gpu: Capability | None) -> str:
    """Return the name of the implementation that a training stage tries first. The check before training may refuse it.

    Args:
        train: settings of the stage. Only `attn_implementation`, `precision` and `packing` are used.
        gpu: compute capability of the GPU, or None for a CPU.
    """
    if train.attn_implementation != AUTO_ATTENTION:
        return train.attn_implementation
    return candidates(find_compute_type(train.precision), gpu, packing=train.packing)[0]


def find_compute_type(precision: Precision) -> torch.dtype:
    """Return the type that attention is computed in during training."""
    return torch.float32 if precision is Precision.fp32 else torch.bfloat16


def for_teacher(student: str, precision: Precision, dtype: torch.dtype) -> str:
    """Return the implementation for the teacher: the student's, or eager if the teacher computes in another type.

    Args:
        student: implementation of the model in training.
        precision: precision of the training. Mixed precision applies to the teacher too.
        dtype: type of the teacher's weights.
    """
    own = torch.bfloat16 if precision is Precision.mixed_bf16 else dtype
    return student if own is find_compute_type(precision) else EAGER


def for_inference(dtype: torch.dtype) -> str:
    """Return the implementation for evaluation on this process' device. `dtype` is the type it is computed in."""
    return for_inference_on(dtype, capability())


def for_inference_on(dtype: torch.dtype, gpu: Capability | None) -> str:
    """Return the implementation for evaluation.

    This is `fused_sinks` where it runs, and otherwise eager. It is never `flex_attention`, which would be compiled for
    each length.

    Args:
        dtype: type that attention is computed in.
        gpu: compute capability of the GPU, or None for a CPU.
    """
    return FUSED_SINKS if FUSED_SINKS in candidates(dtype, gpu) else EAGER
