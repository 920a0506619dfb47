"""Read from a stage's artifact.json what it found, for the results."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

_KEPT = {
    "upcast": ("tensor_bytes", "decoded_tensors", "packed_tensors", "copied_tensors"),
    "sft": ("steps", "train_loss_first", "train_loss_last", "validation_loss_before", "validation_loss"),
    "quantize": ("method", "quantizers"),
    "export": ("target", "tensor_bytes", "copied_tensors", "encoded_tensors", "changed_codes", "other_than_trained"),
}
_TOO_LARGE = "the run does not fit"  # in a finding of doctor
_KEPT["qat"] = (*_KEPT["sft"], "quantizers")


def read(stage: str, directory: Path) -> dict[str, Any]:
    """Return what a complete stage found.

    Args:
        stage: name of the stage.
        directory: directory of the stage.
    """
    artifact = json.loads((directory / "artifact.json").read_text(encoding="utf-8"))
    details = artifact["details"]
    if stage == "doctor":
        return _doctor(details)
    if stage == "verify":
        return {**Counter(details["checks"].values()), "not_checked": details["not_checked"]}
    found = {key: details[key] for key in _KEPT[stage]}
    return found | ({"change_kept": details["account"]["kept"]} if stage == "quantize" else {})


def environment(directory: Path) -> dict[str, Any]:
    """Return the versions with which a complete stage ran, and the program's commit."""
    artifact = json.loads((directory / "artifact.json").read_text(encoding="utf-8"))
    return {key: artifact[key] for key in ("git_commit", "python", "device", "libraries")}


def _doctor(details: dict[str, Any]) -> dict[str, Any]:
    needs = details["needs"]
    return {
        "parameters": needs["parameters"]["all"],
        "predicted_bytes": {stage: found["bytes"] for stage, found in needs["devices"].items()},
        "estimated_because": {stage: found["estimated_because"] for stage, found in needs["devices"].items()},
        "host_free_bytes": details["machine"]["host_free_bytes"],
        "fits": not any(_TOO_LARGE in finding for finding in details["findings"]),
    }
