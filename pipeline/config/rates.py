"""The OmegaConf resolver `rate_of_sft` computes a learning rate from SFT's. conf/config.yaml uses it for QAT.

`${rate_of_sft:0.2}` is a fifth of `sft.learning_rate`. If SFT trains by another method than QAT, SFT's rate is first
converted by `RELATIVE_RATES`. `${rate_of_sft:{full:0.5,lora:0.2,bf16_parts:0.5}}` names a fraction for each method.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.config.bounds import POSITIVE
from pipeline.config.training import Method

RELATIVE_RATES = {Method.full: 1.0, Method.bf16_parts: 1.0, Method.lora: 10.0}
"""Usual learning rates of the methods, relative to full training. Published runs have 2e-5 (full) and 2e-4 (LoRA)."""

_RESOLVER = "rate_of_sft"
_DIGITS = 6  # hides the error of the product, as in 2e-05 * 0.33 = 6.600000000000001e-06


def convert(rate: float, trained: Method, wanted: Method) -> float:
    """Convert a learning rate of the method `trained` to the corresponding rate of the method `wanted`."""
    return _shorten(rate * RELATIVE_RATES[wanted] / RELATIVE_RATES[trained])


def register() -> None:
    """Register the resolver with OmegaConf. It must be registered before a configuration is resolved."""
    OmegaConf.register_new_resolver(_RESOLVER, _rate_of_sft, replace=True)


def _rate_of_sft(*given: object, _root_: DictConfig) -> float:
    """Return a fraction of SFT's learning rate.

    Args:
        given: the fraction, or a mapping from each method of QAT to its fraction.
        _root_: the whole configuration. OmegaConf passes it.

    Raises:
        ValueError: `given` is not one number, or has no number for the method of QAT. Or SFT's rate depends on QAT's.
    """
    fraction = given[0] if len(given) == 1 else None
    sft, wanted = _root_.sft, _root_.qat.method
    written: Any = OmegaConf.to_container(sft, resolve=False)
    written = str(written["learning_rate"])
    if _RESOLVER in written or "qat.learning_rate" in written:
        raise ValueError(f"sft.learning_rate={written} depends on itself. Set sft.learning_rate to a number")
    if not POSITIVE.holds(sft.learning_rate):
        return 1.0  # never used: the bound of sft.learning_rate reports the mistake
    share = fraction.get(wanted.name) if isinstance(fraction, Mapping) else fraction
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise ValueError(
            f"{_RESOLVER} needs a number, as in ${{{_RESOLVER}:0.2}}, or a number for qat.method={wanted.name},"
            f" as in ${{{_RESOLVER}:{{{wanted.name}:0.2}}}}. It was given {', '.join(map(repr, given)) or 'nothing'}"
        )
    return _shorten(convert(sft.learning_rate, sft.method, wanted) * share)


def _shorten(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
