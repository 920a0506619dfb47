"""Lists and copies side files: the files of a model directory except weights and config.json, such as the tokenizer."""

import os
import shutil
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.shards import INDEX
from pipeline.runs.artifacts import BOOKKEEPING

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, chat template, generation config, licence and similar files. Returns their names."""
    names = side_files(source)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def side_files(directory: Path) -> list[str]:
    """List the files that belong to a model, except weights, config.json and this program's own records."""
    return [p.name for p in sorted(directory.iterdir()) if p.is_file() and _is_side_file(p.name)]


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy if the file system does not allow hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # files in the hub's cache are symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _is_side_file(name: str) -> bool:
    return not (
        name in {CONFIG, INDEX, ADAPTER_CONFIG, ".gitattributes", *BOOKKEEPING}
        or name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tmp", ".lock"))
    )
