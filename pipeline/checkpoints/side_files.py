"""Lists and copies side files: the files of a model directory except weights and config.json, such as the tokenizer."""

import os
import shutil
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.shards import INDEX
from pipeline.errors import MOST_PROBLEMS, user_errors
from pipeline.runs.artifacts import BOOKKEEPING

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that can run code when they are loaded. They are neither read nor copied from a model directory."""
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"  # directories of a model in the hub's cache


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
