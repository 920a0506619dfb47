"""Checks the files of an export against the base model: names, shapes, types, shards, configuration and tokenizer.

The checks against the base model read only the headers of weight files. Others read whole files for their digests.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.reading import Checkpoint, TensorFiles, layout_problems
from pipeline.checkpoints.recognition import is_stale_index
from pipeline.checkpoints.shards import INDEX
from pipeline.checkpoints.side_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATES,
    PICKLES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    side_files,
)
from pipeline.errors import UserError
from pipeline.export import EXPORTERS
from pipeline.export.exporter import Exporter
from pipeline.export.layout import stored_tensors
from pipeline.runs.artifacts import ARTIFACT_FILE, BOOKKEEPING, Artifact, Contents, load
from pipeline.runs.damage import find_damage, with_bases
from pipeline.verify.check import Check
from pipeline.verify.configuration import RELEASED_TARGETS, Statement, compare, serving_problems, statements

_ONE_FILE = "files: metadata, tokenizer and chat template equal the base model's"
_SEVERAL_FILES = (
    "files: config.json fits the layout; tokenizer, chat template and generation config equal those of the base model"
    " or of the exported model; shards are sound"
)
_DOCUMENTS = (".md",)  # a model card may be changed
_OTHER_WEIGHTS = (*PICKLES, ".gguf")
_ADAPTERS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_AWAY = "Move it to another directory"


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
    check.problems = [f"{directory}: {problem}" for problem in layout_problems(tensors, expected)]
    check.measured = {"tensors": len(tensors)}
    return check


def check_files(directory: Path, target: str, base: Checkpoint, own: Mapping[str, Path | None] | None = None) -> Check:
    """Check the configuration, side files and shards of an export, and find foreign files.

    Args:
        directory: directory of the export.
        target: layout of the export, a row of EXPORTERS.
        base: the base model.
        own: side files that the exported model has in place of the base model's: name -> file, or None if the file is
            gone. Such a file must be in the export.
    """
    exporter, own = EXPORTERS[target], own or {}
    check = Check(_ONE_FILE if exporter.is_one_file else _SEVERAL_FILES)
    check.problems += _configuration_problems(check, directory, target, base)
    if exporter.is_one_file:
        check.problems += _foreign_problems(directory)
        return check
    check.measured = {"files": len({*side_files(base.directory), *own}), "keys": len(check.stated)}
    check.problems += [*_side_file_problems(directory, exporter, base, own), *_stray_problems(directory)]
    if target in RELEASED_TARGETS:
        check.problems += serving_problems(directory, base.directory)
    check.problems += _shard_problems(directory, exporter, base)
    gone = [name for name, file in own.items() if file is None]
    check.unseen = f"the contents of {', '.join(gone)}: the exported model no longer has them" if gone else None
    return check


def _configuration_problems(check: Check, directory: Path, target: str, base: Checkpoint) -> list[str]:
    """Compare the description of an export with the expected values. `check` gets each key with both values."""
    where = directory if EXPORTERS[target].is_one_file else directory / CONFIG
    try:
        found = list(_state(directory, target, base))
    except UserError as error:
        return error.problems
    except KeyError:  # check_tensors reports a missing tensor
        return []
    check.stated = {each.name: each.record() for each in found}
    return [f"{where}: {each.problem}" for each in found if each.problem is not None]


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


def _state(directory: Path, target: str, base: Checkpoint) -> Iterator[Statement]:
    """Compare the description of an export with the expected values, key by key."""
    exporter = EXPORTERS[target]
    have, tensors = exporter.read_description(directory), exporter.open(directory).tensors
    if target in RELEASED_TARGETS:
        yield from statements(directory, target, have, tensors, base.directory)
    else:
        yield from compare(have, exporter.describe(base, tensors))


def _side_file_problems(
    directory: Path, target: Exporter, base: Checkpoint, own: Mapping[str, Path | None]
) -> Iterator[str]:
    expected: dict[str, Path | None] = {name: base.directory / name for name in side_files(base.directory)}
    expected |= own
    present = set(side_files(directory)) - set(target.records)
    for name in sorted(name for name in {*expected, *present} if not name.endswith(_DOCUMENTS)):
        path, file, whose = directory / name, expected.get(name), "exported" if name in own else "base"
        if name not in present:
            if not _is_replaced(name, own):
                yield f"{path}: missing. Copy it from the {whose} model"
        elif name not in expected:
            yield f"{path}: the base model has no such file. {_AWAY}"
        elif file is not None and path.read_bytes() != file.read_bytes():
            yield f"{path}: differs from the {whose} model's"


def _is_replaced(name: str, own: Mapping[str, Path | None]) -> bool:
    """Return whether the exported model's own files take the place of a file that the base model has."""
    if name in CHAT_TEMPLATES:
        return name not in own and not {*CHAT_TEMPLATES, TOKENIZER_CONFIG}.isdisjoint(own)
    return name in TOKENIZER_FILES and name not in own and TOKENIZER in own


def _stray_problems(directory: Path) -> Iterator[str]:
    for name in sorted(path.name for path in directory.iterdir()):
        if name in _ADAPTERS:
            yield f"{directory / name}: a leftover adapter, which transformers would add to the weights. {_AWAY}"
        elif name.endswith(_OTHER_WEIGHTS):
            yield f"{directory / name}: weights of another layout. {_AWAY}"


def _foreign_problems(directory: Path) -> Iterator[str]:
    for name in sorted(path.name for path in directory.iterdir() if not (path / ARTIFACT_FILE).is_file()):
        if not name.endswith((".gguf", *_DOCUMENTS)) and name not in BOOKKEEPING:
            yield f"{directory / name}: does not belong to the layout, which is a single file. {_AWAY}"


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
    if is_stale_index(directory):
        yield f"{directory / INDEX}: lists files that are missing. {_AWAY}"
    elif (directory / INDEX).is_file():
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
