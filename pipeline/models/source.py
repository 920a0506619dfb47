"""Find the base checkpoint in a directory, download it from the hub, or make a synthetic one."""

from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import Shape
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.recognition import describe_missing, find_left_over, raise_if_other_layout
from pipeline.checkpoints.released import describe_missing_stop, raise_if_unfit
from pipeline.config import SYNTHETIC, ModelConfig
from pipeline.config.hub_ids import is_hub_id
from pipeline.errors import UserError
from pipeline.models import demo_model, tiny_model
from pipeline.runs.console import say
from pipeline.runs.paths import absolute
from pipeline.runs.processes import is_main_process, wait_for_everyone
from pipeline.runs.run import SOURCE_DIR, Run
from pipeline.runs.up_to_date import say_if_needed

_HUB_SIDE_FILES = ["*.json", "*.jinja", "LICENSE*", "USAGE_POLICY*", "README.md"]
_HUB_FILES = [*_HUB_SIDE_FILES, "*.safetensors"]
_HUB_OTHER_LAYOUTS = ["original/*", "metal/*"]
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """The base checkpoint on this machine's disk.

    Attributes:
        directory: directory of the checkpoint.
        fingerprint: hash of the configuration and of samples of the weights. Hashing all 65 GB of a large model would
            take too long.
    """

    directory: Path
    fingerprint: str

    def open(self) -> Checkpoint:
        """Open the checkpoint and check it."""
        return Checkpoint(self.directory)


def locate(run: Run, model: ModelConfig, key: str = "model.path") -> Source:
    """Find, download or make the checkpoint that `model.path` names, and check it.

    Messages use `key` as the name of the setting.

    Raises:
        UserError: the directory or hub id does not exist, or is not a complete gpt-oss checkpoint.
    """
    directory = base_directory(run, model)
    if not directory.is_dir():
        raise UserError(f"{key}={model.path}: {describe_missing(model.path)}")
    Checkpoint(directory).close()
    _judge(run, directory)
    return Source(directory, sampled_fingerprint(directory))


def locate_without_weights(run: Run, model: ModelConfig) -> Path:
    """Find or download the base model's config.json, tokenizer and chat template, and return their directory.

    Weights are not downloaded.

    Raises:
        UserError: the directory or hub id does not exist, or holds something else than a model that can be trained.
    """
    directory = base_directory(run, model, _HUB_SIDE_FILES)
    if not directory.is_dir():
        raise UserError(f"model.path={model.path}: {describe_missing(model.path)}")
    raise_if_other_layout(directory)
    Shape.of(read_config(directory), directory / CONFIG)
    _judge(run, directory)
    return directory


def _judge(run: Run, directory: Path) -> None:
    """Judge the configuration of a source, and report files and entries that are left over from another model."""
    raise_if_unfit(directory)
    for line in (*find_left_over(directory), describe_missing_stop(directory)):
        if line is not None:
            say_if_needed(run.stage.name, line)


def base_directory(run: Run, model: ModelConfig, hub_files: list[str] = _HUB_FILES) -> Path:
    """Return the model's directory. Download `hub_files` if the path is a hub id, or make the synthetic model."""
    if model.path.startswith(SYNTHETIC):
        return _make_synthetic(run, model)
    directory = absolute(model.path)
    if directory.exists() or not is_hub_id(model.path):
        return directory
    return _fetch(model.path, model.revision, hub_files)


def _make_synthetic(run: Run, model: ModelConfig) -> Path:
    name = model.path.removeprefix(SYNTHETIC)
    if name not in ("tiny", "demo"):
        raise UserError(
            f"model.path={model.path!r}: no such synthetic model. Use {SYNTHETIC}tiny, {SYNTHETIC}demo, a directory or"
            " a hub id."
        )
    is_demo = name == "demo"
    directory = run.stage_dir(SOURCE_DIR) / (demo_model.name() if is_demo else tiny_model.name_of(model.tiny))
    if is_main_process() and not directory.is_dir():
        try:
            demo_model.create_demo(directory) if is_demo else tiny_model.create_tiny(directory, model.tiny)
        except OSError as error:
            raise run.not_writable(directory, error) from error
        say("source", f"made a {'small trained' if is_demo else 'tiny random'} gpt-oss: {directory}")
    wait_for_everyone()
    return directory


def _fetch(hub_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=files, ignore_patterns=_HUB_OTHER_LAYOUTS)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model.path={hub_id!r}{at}: no such directory, and the hub cannot be reached or does not have it"
            f" ({reason}). Check the name, your network and `hf auth login`, or give a directory."
        ) from error


def sampled_fingerprint(directory: Path) -> str:
    """Return the XXH3-128 hash of config.json and the weight files.

    For a weight file, the hash covers its name, its size and 64 evenly spaced parts.
    """
    digest = xxhash.xxh3_128((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        update_with_samples(digest, path)
    return digest.hexdigest()


def update_with_samples(digest: xxhash.xxh3_128, path: Path) -> None:
    """Update a hash with the name, the size and evenly spaced parts of a weight file."""
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
