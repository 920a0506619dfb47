"""Lists and copies side files: the files of a model directory except weights and config.json, such as the tokenizer."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.shards import INDEX
from pipeline.errors import MOST_PROBLEMS, user_errors
from pipeline.runs.artifacts import BOOKKEEPING
from pipeline.runs.foreign_files import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that can run code when they are loaded. They are neither read nor copied from a model directory."""
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"  # directories of a model in the hub's cache
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = {
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
}
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
GENERATION_CONFIG = "generation_config.json"


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, chat template, generation config, licence and similar files. Returns their names."""
    names = side_files(source)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def side_files(directory: Path) -> list[str]:
    """List the files that belong to a model, except weights, config.json and this program's own records.

    Raises:
        UserError: one of them is a symbolic link to a file outside the model directory. The file would be copied into
            the run, and published with the model.
    """
    found = [p for p in sorted(directory.iterdir()) if p.is_file() and _is_side_file(p.name)]
    homes = _homes(directory)
    outside = [p for p in found if p.is_symlink() and not any(p.resolve().is_relative_to(home) for home in homes)]
    if outside:
        raise user_errors(
            [
                f"{p}: is a symbolic link to {p.resolve()}, outside the model directory. Side files are copied into the"
                f" run and published with the model. Remove the link, or replace it by a copy."
                for p in outside
            ],
            most=MOST_PROBLEMS,
        )
    return [p.name for p in found]


def choose_side_files(base: Path, own: Path) -> dict[str, Path]:
    """Choose the side files of a model that was trained from a base: name -> file.

    The model's own tokenizer, chat template and generation config are chosen, where it has them. The files of a
    tokenizer belong together, and an old chat template would hide a new one. So these groups are never mixed. All other
    files, such as the licence, are the base model's.
    """
    chosen = {name: base / name for name in side_files(base)}
    mine = {name: own / name for name in side_files(own)}
    groups = [{GENERATION_CONFIG}] if GENERATION_CONFIG in mine else []
    groups += [TOKENIZER_FILES] if TOKENIZER in mine else []
    groups += [{*CHAT_TEMPLATES}] if _has_own_template(own, mine) else []
    for group in groups:
        chosen = {name: file for name, file in chosen.items() if name not in group}
        chosen |= {name: file for name, file in mine.items() if name in group}
    return dict(sorted(chosen.items()))


def _has_own_template(own: Path, mine: Mapping[str, Path]) -> bool:
    if not {*CHAT_TEMPLATES}.isdisjoint(mine):
        return True
    if not {TOKENIZER, TOKENIZER_CONFIG} <= mine.keys():
        return False
    return "chat_template" in read_json(own / TOKENIZER_CONFIG)


def describe_differences(base: Path, chosen: Mapping[str, Path]) -> dict[str, str]:
    """Describe each chosen side file that differs from the base model's, and each that takes its place."""
    present, found = set(side_files(base)), {}
    for name, file in chosen.items():
        if file.parent != base and (name not in present or file.read_bytes() != (base / name).read_bytes()):
            found[name] = (
                f"{name}: {file}, " + ("which differs from" if name in present else "which is not in") + " the"
            )
            found[name] += " base model's" if name in present else " base model"
    found |= {name: f"{name}: left out, because the model has files of its own" for name in present - chosen.keys()}
    return found


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy if the file system does not allow hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # files in the hub's cache are symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _homes(directory: Path) -> list[Path]:
    """List the directories that may hold the files of a model: its own, and the blobs of its repository in the cache.

    In the hub's cache, snapshots/<commit>/<name> is a link to ../../blobs/<hash>.
    """
    own = directory.resolve()
    return [own, own.parents[1] / _BLOBS] if own.parent.name == _SNAPSHOTS else [own]


def _is_side_file(name: str) -> bool:
    return not (
        name in {CONFIG, INDEX, ADAPTER_CONFIG, ".gitattributes", *BOOKKEEPING}
        or name.endswith((".safetensors", *PICKLES, ".gguf", ".tmp", ".lock"))
    )
