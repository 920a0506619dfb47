"""Recognizes adapters that another program saved with PEFT, and judges whether this program can merge them exactly.

The configuration is read without importing PEFT. `merging.Merger` merges the weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.errors import user_errors
from pipeline.models.source import Source, sampled_fingerprint, update_with_samples
from pipeline.runs.artifacts import ARTIFACT_FILE

_LORA = "LORA"
_OF_NO_MEANING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_NOT_MERGED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings of PEFT's LoRA whose result is not base + scaling * B A."""
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of `init_lora_weights`, or their beginnings, with which PEFT changes the base's weights before training."""
_MERGE = "Merge them with PEFT (merge_and_unload, then save_pretrained), and give the result"


def holds_adapters(directory: Path) -> bool:
    """Return whether a directory holds adapters of another program and no whole model."""
    whole = {path.name for path in directory.glob("*.safetensors")} - {ADAPTER_WEIGHTS}
    return (directory / ADAPTER_CONFIG).is_file() and not whole and not (directory / ARTIFACT_FILE).is_file()


def describe_other_contents(directory: Path) -> str | None:
    """Say what is at a path in place of adapters of another program, and what to do. Return None if they are there."""
    if holds_adapters(directory):
        return None
    if directory.is_file():
        return f"is a file. Give the directory that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
    if not directory.is_dir():
        return "neither a stage (sft, upcast) nor a directory. Give the directory of adapters that PEFT saved."
    if (directory / ARTIFACT_FILE).is_file():
        return "is a stage of a run. Go on in that run with quantize.source=sft, or start SFT from it with sft.start."
    if any(directory.glob("*.safetensors")) or (directory / CONFIG).is_file():
        return "holds a whole model, not adapters. Give it as model.path, with quantize.source=upcast."
    return f"has no {ADAPTER_CONFIG}. Give the directory of adapters that PEFT saved (save_pretrained)."


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json, and judge it.

    Raises:
        UserError: this program cannot merge the adapters exactly, or their weights are missing. The message names each
            setting.
    """
    config, path = read_config(directory, ADAPTER_CONFIG), directory / ADAPTER_CONFIG
    problems = [f"{path}: {problem}." for problem in _problems(config)]
    if not problems and not (directory / ADAPTER_WEIGHTS).is_file():
        pickled = sorted(file.name for file in directory.glob("adapter_model.bin"))
        state = f"in PyTorch's format ({pickled[0]}), not in safetensors" if pickled else "missing"
        remedy = "Load them with PEFT, and save them with save_pretrained" if pickled else f"Fetch {ADAPTER_WEIGHTS}"
        problems = [f"{directory}: the weights of the adapters are {state}. {remedy}."]
    if problems:
        raise user_errors(problems)
    return config


def _problems(config: Mapping[str, object]) -> Iterator[str]:
    if (kind := config.get("peft_type")) != _LORA:
        yield f"peft_type is {kind!r}, and this program merges only {_LORA!r}. {_MERGE}"
        return
    for key in _NOT_MERGED:
        if config.get(key):
            yield f"{key}={config[key]!r}: this program cannot merge such adapters. {_MERGE}"
    if str(begun := config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        yield f"init_lora_weights={begun!r} changed the base's weights before training. {_MERGE}"


def fingerprint(directory: Path, base: str) -> str:
    """Return a fingerprint of adapters on a base with the fingerprint `base`. It depends on contents alone."""
    config = {key: value for key, value in read_config(directory, ADAPTER_CONFIG).items() if key not in _OF_NO_MEANING}
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
    update_with_samples(digest, directory / ADAPTER_WEIGHTS)
    digest.update(base.encode())
    return digest.hexdigest()


def describe_other_base(config: Mapping[str, object], base: Source, model_path: str) -> str | None:
    """Compare the base that adapters name with the one that they are merged on. Return a warning, or None."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or named == model_path:
        return None
    directory = Path(named).expanduser()
    if (directory / "config.json").is_file():
        if sampled_fingerprint(directory) == base.fingerprint:
            return None
        state = "which is not the model in"
    else:
        state = "which cannot be compared here with"
    return (
        f"the adapters were trained on {named}, {state} model.path={model_path}. They are merged on model.path. On"
        " another base they give a wrong model"
    )
