"""Checks the files of an export against the base model: names, shapes, types, shards, configuration and tokenizer.

The checks against the base model read only the headers of weight files. Others read whole files for their digests.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.reading import Checkpoint, TensorFiles, layout_problems
from pipeline.checkpoints.shards import INDEX
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, side_files
from pipeline.errors import UserError, at_most
from pipeline.export.exporter import Exporter
from pipeline.export.layout import stored_tensors
from pipeline.runs.artifacts import ARTIFACT_FILE, BOOKKEEPING, Artifact, Contents, load
from pipeline.runs.damage import find_damage, with_bases
from pipeline.verify.check import Check

_WITHOUT_MEANING = ("transformers_version", "_name_or_path", "producer")
_DOCUMENTS = (".md",)  # a model card may be changed
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
_ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_ABSENT = object()
_LONGEST = 80  # characters of a value in a message; longer values are truncated


def check_tensors(directory: Path, target: Exporter, base: Checkpoint) -> Check:
    """Check the names, shapes and types of an export's tensors. Weights are compared only if this check passes."""
    check = Check("tensors: names, shapes and types fit the layout and the base model's sizes")
    try:
        tensors = target.open(directory).tensors
    except UserError as error:
        check.problems += error.problems
        return check
    expected, optional = stored_tensors(target.layout(base.shape)), target.optional(base.shape)
    expected |= optional if optional.keys() & tensors.keys() else {}
    check.problems = [f"{directory}: {problem}" for problem in at_most(layout_problems(tensors, expected))]
    check.measured = {"tensors": len(tensors)}
    return check


def check_files(directory: Path, target: Exporter, base: Checkpoint) -> Check:
    """Compare configuration and side files with the base model's, check the shards, and find foreign files."""
    if target.is_one_file:
        check = Check("files: metadata, tokenizer and chat template equal the base model's")
        looks: tuple[_Look, ...] = (_config_problems, _foreign_problems)
    else:
        check = Check(
            "files: config.json, tokenizer, chat template and generation config equal the base model's; sound shards"
        )
        looks = (_config_problems, _side_file_problems, _stray_problems, _shard_problems)
        check.measured = {"files": len(side_files(base.directory))}
    check.problems = [problem for look in looks for problem in look(directory, target, base)]
    return check


_Look = Callable[[Path, Exporter, Checkpoint], Iterator[str]]


def check_unchanged(export: Artifact, found: Contents) -> Check:
    """Compare the files of an export with the record in its artifact.json.

    Args:
        export: the record in artifact.json.
        found: the present files, from `artifacts.fingerprint_of`.
    """
    check = Check("unchanged: the files are as export wrote them")
    for name, size in export.files.items():
        if found.sizes.get(name) != size:
            has = f"has {found.sizes.get(name)} bytes, but had {size} when" if name in found.sizes else None
            check.problems.append(f"{export.directory / name}: {has or 'missing, but existed when'} export wrote it")
    if export.digests and not check.problems:
        check.problems = find_damage(export, found.digests, stage="verify")
    added = sorted(found.sizes.keys() - export.files.keys())
    if added and not check.problems:
        check.skipped = f"export did not write {', '.join(added)}, so the fingerprint cannot be compared"
    elif found.fingerprint != export.fingerprint and not check.problems:
        check.problems.append(f"{export.directory}: the contents of a file changed since export wrote it")
    return check


def check_trained_files(directory: Path) -> Check:
    """Read the trained model's files, and those of the checkpoint below adapters, and compare their digests."""
    check = Check("trained model: its files are as its stage wrote them")
    if not (directory / ARTIFACT_FILE).is_file():
        check.skipped = f"{directory} has no {ARTIFACT_FILE} with digests"
        return check
    artifacts = with_bases([load(directory)])
    check.problems = [problem for artifact in artifacts for problem in find_damage(artifact, stage="verify")]
    check.measured["files"] = sum(len(artifact.digests) for artifact in artifacts)
    without = [str(artifact.directory) for artifact in artifacts if not artifact.digests]
    if without and not check.problems:
        check.skipped = f"an older version of this program wrote {', '.join(without)}, without digests"
    return check


def _config_problems(directory: Path, target: Exporter, base: Checkpoint) -> Iterator[str]:
    try:
        have, names = target.read_description(directory), target.open(directory).tensors
    except UserError as error:
        yield from error.problems
        return
    for difference in _config_differences(have, target.describe(base, names)):
        yield f"{directory if target.is_one_file else directory / CONFIG}: {difference}"


def _config_differences(have: Mapping[str, object], want: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Describe each difference between `have` and `want`, with its dotted key."""
    for key in sorted({*have, *want} - set(_WITHOUT_MEANING)):
        old, new = want.get(key, _ABSENT), have.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _config_differences(new, old, f"{prefix}{key}.")
        elif old is _ABSENT:
            yield f"{prefix}{key} is {_shorten(new)}, but must be absent"
        elif new is _ABSENT:
            yield f"{prefix}{key} is missing, but must be {_shorten(old)}"
        elif old != new:
            yield f"{prefix}{key} is {_shorten(new)}, but must be {_shorten(old)}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _side_file_problems(directory: Path, target: Exporter, base: Checkpoint) -> Iterator[str]:
    expected, present = set(side_files(base.directory)), set(side_files(directory)) - set(target.records)
    for name in sorted(name for name in expected | present if not name.endswith(_DOCUMENTS)):
        path = directory / name
        if name not in present:
            yield f"{path}: missing. Copy it from the base model"
        elif name not in expected:
            yield f"{path}: the base model has no such file. Remove it"
        elif path.read_bytes() != (base.directory / name).read_bytes():
            yield f"{path}: differs from the base model's"


def _stray_problems(directory: Path, _: Exporter, __: Checkpoint) -> Iterator[str]:
    for name in sorted(path.name for path in directory.iterdir()):
        if name in _ADAPTERS:
            yield f"{directory / name}: a leftover adapter, which transformers would add to the weights. Remove it"
        elif name.endswith(_OTHER_WEIGHTS):
            yield f"{directory / name}: weights of another layout. Remove it"


def _foreign_problems(directory: Path, *_: object) -> Iterator[str]:
    for name in sorted(path.name for path in directory.iterdir() if not (path / ARTIFACT_FILE).is_file()):
        if not name.endswith((".gguf", *_DOCUMENTS)) and name not in BOOKKEEPING:
            yield f"{directory / name}: does not belong to the layout, which is a single file. Remove it"


def _shard_problems(directory: Path, target: Exporter, base: Checkpoint) -> Iterator[str]:
    """Find shards that strict readers refuse, and tensors that careless readers combine wrongly."""
    try:
        files = TensorFiles(directory)
    except UserError:  # check_tensors reports it
        return
    for path in files.weight_files():
        if path.name != INDEX:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != "pt":
                    yield f'{path}: its metadata must have {{"format": "pt"}}, or some readers refuse it'
    if (directory / INDEX).is_file():
        yield from _index_problems(files, target, base)


def _index_problems(files: TensorFiles, target: Exporter, base: Checkpoint) -> Iterator[str]:
    path = files.directory / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    total = sum(info.bytes for info in files.tensors.values())
    if (said := index.get("metadata", {}).get("total_size", total)) != total:
        yield f"{path}: total_size is {said}, but the tensors have {total} bytes"
    for held in target.layout(base.shape).values():
        homes = {name: index["weight_map"].get(name) for name in held.tensors}
        if len(set(homes.values())) > 1:
            # llama.cpp's converter combines scales with the last blocks that it has read. These blocks may belong to
            # another tensor.
            where = " and ".join(f"{name} in {home}" for name, home in homes.items())
            yield f"{where}: they must be in one file, or llama.cpp's converter silently writes a wrong model"
