"""The files of an export against the base model's: names, shapes and types, shards, configuration, tokenizer.

Weights are not read here but for their headers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.artifacts import Artifact
from pipeline.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, Checkpoint, read_config, side_files
from pipeline.errors import UserError
from pipeline.export.mxfp4 import released_config
from pipeline.gpt_oss import expert_projections
from pipeline.proof.check import Check
from pipeline.shards import INDEX

_WITHOUT_MEANING = ("transformers_version", "_name_or_path")
_DOCUMENTS = (".md",)  # a model card is its author's
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
_ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_ABSENT = object()


def check_tensors(directory: Path, base: Path) -> Check:
    """Names, shapes and types of an export's tensors; only where they are right can weights be compared."""
    check = Check("tensors: names, shapes and types as the base model's")
    try:
        export = Checkpoint(directory)
    except UserError as error:
        check.problems += error.problems
        return check
    if not export.is_packed:
        check.problems.append(f"{directory}: experts are stored as BF16, not as MXFP4 blocks and scales")
    if export.shape != Checkpoint(base).shape:  # which check_files reports
        check.skipped = f"the sizes in {directory / CONFIG} are not the base model's"
    check.measured = {"tensors": len(export.tensors), "weight_bytes": export.weight_bytes}
    return check


def check_files(directory: Path, base: Path) -> Check:
    """Every key of config.json and every file beside the weights against the base model's; shards, index, strays."""
    check = Check("files: config.json, tokenizer, chat template, generation config as the base model's, sound shards")
    look = (_config_problems, _side_file_problems, _stray_problems, _shard_problems)
    check.problems = [problem for problems in look for problem in problems(directory, base)]
    check.measured = {"files": len(side_files(base))}
    return check


def check_unchanged(export: Artifact, fingerprint: str, sizes: dict[str, int]) -> Check:
    """The files of an export against what its artifact.json recorded when they were written.

    Args:
        export: of the directory.
        fingerprint, sizes: of its files as they are now, as `artifacts.fingerprint_of` gives them.
    """
    check = Check("unchanged: the files are those that export wrote")
    for name, size in export.files.items():
        if sizes.get(name) != size:
            state = f"has {sizes[name]} bytes, {size} when" if name in sizes else "missing, it was there when"
            check.problems.append(f"{export.directory / name}: {state} export wrote it")
    added = sorted(sizes.keys() - export.files.keys())
    if added and not check.problems:
        check.skipped = f"export did not write {', '.join(added)}, so the fingerprint of its files says nothing"
    elif fingerprint != export.fingerprint and not check.problems:
        check.problems.append(f"{export.directory}: the contents of a file changed since export wrote it")
    return check


def _config_problems(directory: Path, base: Path) -> list[str]:
    try:
        have = read_config(directory)
    except UserError:  # which check_tensors reports
        return []
    differences = _differences(have, released_config(read_config(base)))
    return [f"{directory / CONFIG}: {difference}" for difference in differences]


def _differences(have: dict[str, Any], want: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What is wrong in `have`, by dotted key."""
    for key in sorted({*have, *want} - set(_WITHOUT_MEANING)):
        old, new = want.get(key, _ABSENT), have.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(new, old, f"{prefix}{key}.")
        elif old is _ABSENT:
            yield f"{prefix}{key} is {new!r}, but the base model has no such key"
        elif new is _ABSENT:
            yield f"{prefix}{key} is missing, must be {old!r}"
        elif old != new:
            yield f"{prefix}{key} is {new!r}, must be {old!r}"


def _side_file_problems(directory: Path, base: Path) -> Iterator[str]:
    expected, present = set(side_files(base)), set(side_files(directory))
    for name in sorted(name for name in expected | present if not name.endswith(_DOCUMENTS)):
        path = directory / name
        if name not in present:
            yield f"{path}: missing; the base model has it"
        elif name not in expected:
            yield f"{path}: the base model has no such file; remove it"
        elif path.read_bytes() != (base / name).read_bytes():
            yield f"{path}: differs from the base model's"


def _stray_problems(directory: Path, _: Path) -> Iterator[str]:
    for name in sorted(path.name for path in directory.iterdir()):
        if name in _ADAPTERS:
            yield f"{directory / name}: a leftover adapter, which transformers would add to the weights; remove it"
        elif name.endswith(_OTHER_WEIGHTS):
            yield f"{directory / name}: weights that do not belong to the layout; remove it"


def _shard_problems(directory: Path, _: Path) -> Iterator[str]:
    """Shards that a strict reader refuses, or a careless one pairs wrongly; of weights that can be opened."""
    try:
        export = Checkpoint(directory)
    except UserError:  # which check_tensors reports
        return
    for path in export.weight_files():
        if path.name != INDEX:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != "pt":
                    yield f'{path}: its metadata must say {{"format": "pt"}}; some readers refuse it'
    if (directory / INDEX).is_file():
        yield from _index_problems(export)


def _index_problems(export: Checkpoint) -> Iterator[str]:
    path = export.directory / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    total = sum(info.bytes for info in export.tensors.values())
    if (said := index.get("metadata", {}).get("total_size", total)) != total:
        yield f"{path}: total_size is {said}, the tensors have {total} bytes"
    for projection in expert_projections(export.shape) if export.is_packed else ():
        blocks, scales = (index["weight_map"][name] for name in (projection.blocks, projection.scales))
        if blocks != scales:
            # llama.cpp's converter takes them for the scales of the blocks that it read last.
            yield (
                f"{projection.scales} is in {scales}, its blocks in {blocks}: they must be in one file, or llama.cpp's"
                " converter writes a wrong model without a word"
            )
