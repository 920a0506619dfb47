"""Describes a path that is no gpt-oss checkpoint in Hugging Face's layout, and names the remedy."""

import re
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.dtypes import PLAIN_TYPES
from pipeline.checkpoints.gpt_oss import ARCHITECTURE, MODEL_TYPE, PACKED_SUFFIXES
from pipeline.checkpoints.shards import INDEX, SINGLE
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLES, side_files
from pipeline.config import Stage
from pipeline.errors import MOST_PROBLEMS, UserError, user_errors
from pipeline.runs.artifacts import ARTIFACT_FILE
from pipeline.runs.commands import stage_command
from pipeline.runs.foreign_files import list_irregular, read_json

_SMALL, _LARGE = "openai/gpt-oss-20b", "openai/gpt-oss-120b"
_BY_LAYERS = {24: _SMALL, 36: _LARGE}
_ORIGINAL_KEYS = {"num_experts", "experts_per_token", "initial_context_length"}  # of config.json in original/
_ORIGINAL = "original"
_TOKENIZER = "tokenizer.json"
_TRAINABLE = "mxfp4"  # the only quant_method of config.json whose weights can be trained
_LFS = b"version https://git-lfs"
_GGUF = "GGUF, the format of llama.cpp. These weights cannot be trained"
_CHECKPOINT = f"Give a checkpoint in safetensors, such as model.path={_SMALL}"


def describe_missing(path: str) -> str:
    """Say whether a path that is not a directory is a file, or does not exist. The text continues `model.path=…: `."""
    file = Path(path).expanduser()
    size = re.search(r"gpt-oss-(20b|120b)", path)
    if not file.is_file():
        return f"no such directory.{f' Did you mean openai/{size[0]}?' if size is not None and '/' not in path else ''}"
    try:
        is_gguf = file.suffix == ".gguf" or _starts_with(file, b"GGUF")
    except OSError as error:
        return f"is a file that cannot be read ({error.strerror}). {_CHECKPOINT}."
    if is_gguf:
        return f"holds {_GGUF}. {_CHECKPOINT}."
    if file.suffix == ".safetensors" or file.name in (CONFIG, ADAPTER_CONFIG, _TOKENIZER):
        return f"no such directory. It is a file. Give the directory that it is in: {file.parent}."
    return f"no such directory. It is a file. {_CHECKPOINT}."


def raise_if_other_layout(directory: Path) -> None:
    """Check config.json and the names and kinds of files, without opening the weights.

    Raises:
        UserError: the directory holds something else than a checkpoint that can be trained, or a named pipe, a device
            or a broken link; or `side_files` refuses a link. The message says what to do.
    """
    if directory.is_dir():
        if irregular := list_irregular(directory):
            raise user_errors(irregular, most=MOST_PROBLEMS)
        side_files(directory)
    found = _describe_config(directory) if (directory / CONFIG).is_file() else _describe_without_config(directory)
    if found is not None:
        raise UserError(f"{directory}: {found}")


def describe_weights(directory: Path) -> str:
    """Describe the weights of a directory that has config.json, but no weights in safetensors."""
    if any(directory.glob("*.gguf")):
        return f"Its weights are {_GGUF}. {_CHECKPOINT}"
    pickled = sorted(path.name for suffix in PICKLES for path in directory.glob(f"*{suffix}"))
    if pickled:
        return (
            f"Its weights are in PyTorch's format ({pickled[0]}), not in safetensors. Load the model with transformers,"
            " and save it with save_pretrained"
        )
    return "Fetch the *.safetensors files"


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is a pointer that Git LFS leaves in place of the file itself."""
    return file.is_file() and _starts_with(file, _LFS)


def find_wrapper(stored: Collection[str], expected: Collection[str]) -> str | None:
    """Return the prefix that a wrapper, such as PEFT or DDP, put before the names of all tensors, or None."""
    known = next(iter(expected))
    prefix = next((name.removesuffix(known) for name in stored if name.endswith(f".{known}")), None)
    return prefix if prefix is not None and all(name.startswith(prefix) for name in stored) else None


def _describe_config(directory: Path) -> str | None:
    config = read_config(directory)
    if config.get("model_type") is None and _ORIGINAL_KEYS & config.keys():
        return _describe_original(directory, config)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if (
        config.get("model_type") == MODEL_TYPE
        and method not in (None, _TRAINABLE)
        and find_storage(directory) is not Storage.plain
    ):
        return (
            f"{CONFIG} says that the weights are quantized with {method!r}, which cannot be trained. Give the model in"
            f" MXFP4 or BF16, such as model.path={_hub_id(config)}. If the weights are BF16 nevertheless, as after a"
            f" merge, remove quantization_config from {CONFIG}."
        )
    return None


def find_left_over(directory: Path) -> list[str]:
    """Describe unused remains of another model in a directory with config.json.

    Trainers copy config.json of the model that they loaded: another tool's quantization, or the name of a wrapper. An
    index is left over if one file was saved beside it.
    """
    config, path, found = read_config(directory), directory / CONFIG, []
    entry = config.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("quant_method") != _TRAINABLE:
        found.append(
            f"{path}: quantization_config ({entry.get('quant_method')!r}) is left over from another model, because the"
            " weights are not quantized. It is ignored, and exports do not have it"
        )
    if (names := config.get("architectures", [ARCHITECTURE])) != [ARCHITECTURE]:
        found.append(f"{path}: architectures is {names!r}. Exports have {[ARCHITECTURE]!r}, the name that engines know")
    if is_stale_index(directory):
        found.append(
            f"{directory / INDEX}: is left over from another save, because the files that it lists are missing. The"
            f" weights are read from {SINGLE}, as transformers does"
        )
    return found


def is_stale_index(directory: Path) -> bool:
    """Return whether an index lists only files that are missing, beside a single weight file."""
    if not (directory / INDEX).is_file() or not (directory / SINGLE).is_file():
        return False
    try:
        listed = read_json(directory / INDEX)["weight_map"].values()
        return bool(listed) and not any((directory / str(name)).is_file() for name in listed)
    except (UserError, KeyError, TypeError, AttributeError):  # opening the weights reports it
        return False


class Storage(Enum):
    """How the weights of a directory are stored: in types that can be trained, or with experts in MXFP4."""

    plain = "plain"
    packed = "packed"


def find_storage(directory: Path) -> Storage | None:
    """Return how weights are stored, judged by the names and types of tensors. None: another way, or no weights."""
    tensors: dict[str, str] = {}
    try:
        for path in directory.glob("*.safetensors"):
            if path.name != ADAPTER_WEIGHTS:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):  # opening the weights reports it
        return None
    if tensors and {*tensors.values()} <= {*PLAIN_TYPES}:
        return Storage.plain
    return Storage.packed if any(name.endswith(PACKED_SUFFIXES) for name in tensors) else None


def _describe_original(directory: Path, config: Mapping[str, object]) -> str:
    hub_id, root = _hub_id(config), directory.parent
    if _is_model(root):
        remedy = f"Give the root of the repository: model.path={root}"
    else:
        remedy = (
            f"Give model.path={hub_id}, or fetch the root of that repository without original/: hf download {hub_id}"
            f" --exclude 'original/*' --exclude 'metal/*' --local-dir <directory>"
        )
    return f"holds OpenAI's original layout (names such as block.0.attn.qkv.weight), not Hugging Face's. {remedy}."


def _describe_without_config(directory: Path) -> str | None:
    if (directory / CONFIG).exists():
        return f"its {CONFIG} is a directory, not a file. Move the directory away, and fetch the file again."
    if (directory / ADAPTER_CONFIG).is_file():
        return _describe_adapters(directory)
    if gguf := sorted(directory.glob("*.gguf")):
        return f"holds only {_GGUF} ({gguf[0].name}). {_CHECKPOINT}."
    inner = [path for pattern in ("*", "*/*", "*/*/*") for path in sorted(directory.glob(f"{pattern}/{CONFIG}"))]
    models = [path.parent for path in inner if _is_model(path.parent)]
    if models:
        return f"has no {CONFIG}, so it is not a model directory. A directory in it is: model.path={models[0]}"
    if (directory / _ORIGINAL / CONFIG).is_file():
        return _describe_original(directory / _ORIGINAL, read_config(directory / _ORIGINAL))
    if (directory / _TOKENIZER).is_file():
        return f"has no {CONFIG} and no weights, only a tokenizer. Fetch the whole repository: hf download <owner/name>"
    return None


def _describe_adapters(directory: Path) -> str:
    kind = f"holds adapters ({ADAPTER_CONFIG}), not a whole model."
    if (directory / ARTIFACT_FILE).is_file():
        merged = stage_command(Stage.export, f"export.source={directory}", "export.target=bf16")
        return f"{kind} Merge them into their base model, and give the export: {merged}"
    base = read_config(directory, ADAPTER_CONFIG).get("base_model_name_or_path")
    given = base if isinstance(base, str) and base else "<base model>"
    merged = stage_command(Stage.export, f"model.path={given}", f"export.source={directory}")
    return f"{kind} Give their base model (model.path={given}). This command merges and exports them: {merged}"


def _is_model(directory: Path) -> bool:
    """Return whether a directory has the config.json of a gpt-oss model."""
    try:
        return read_config(directory).get("model_type") == MODEL_TYPE
    except UserError:
        return False


def _hub_id(config: Mapping[str, object]) -> str:
    layers = config.get("num_hidden_layers")
    return _BY_LAYERS.get(layers, _SMALL) if isinstance(layers, int) else _SMALL


def _starts_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(start)) == start
