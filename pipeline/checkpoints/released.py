"""States what the configuration of a gpt-oss checkpoint must say, so that every engine reads the model in the same way.

The statement follows config.json of openai/gpt-oss-20b and -120b. It does not use the code that writes exports, so
`verify` can check that code with it. Sources are judged by the same statement before any work begins.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG, is_quantized, read_config
from pipeline.checkpoints.recognition import Storage, find_storage
from pipeline.checkpoints.side_files import CHAT_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG
from pipeline.errors import UserError, user_errors
from pipeline.runs.foreign_files import read_json

ARCHITECTURES = ["GptOssForCausalLM"]
CONSTANTS: Mapping[str, object] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
"""Keys whose value is the same for every gpt-oss. Engines hard-code these values, and some do not read the keys."""
ROPE_KEYS = ("beta_fast", "beta_slow", "factor", "original_max_position_embeddings", "rope_type", "truncate")
"""Keys of `rope_scaling`. transformers 5 writes them as `rope_parameters`, together with `rope_theta`."""
RETURN, CALL = "<|return|>", "<|call|>"
_SIZES = ("num_experts_per_tok", "sliding_window", "max_position_embeddings")


def layer_types(layers: int) -> list[str]:
    """Return `layer_types` of a model. Layers with an even index attend to a sliding window."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def rope_of(config: Mapping[str, object]) -> tuple[dict[str, object], object]:
    """Return `rope_scaling` and `rope_theta` of a configuration, which transformers 4 or 5 wrote.

    A key that neither form has is missing from the result. Without `rope_theta`, the second value is None.
    """
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    found: dict[str, object] = {}
    for form in (parameters, scaling):
        found |= {key: form[key] for key in ROPE_KEYS if key in form} if isinstance(form, Mapping) else {}
    own = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
    return found, config.get("rope_theta") if own is None else own


def token_ids(directory: Path) -> dict[str, int]:
    """Return the special tokens of tokenizer.json, text -> id. The result is empty if the file cannot be read."""
    try:
        content = read_json(directory / TOKENIZER)
        return {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, UserError, KeyError, TypeError):
        return {}


def has_chat_template(directory: Path) -> bool:
    """Return whether a directory has a chat template, in a file of its own or in tokenizer_config.json."""
    if any((directory / name).is_file() for name in CHAT_TEMPLATES):
        return True
    path = directory / TOKENIZER_CONFIG
    return path.is_file() and bool(read_config(directory, TOKENIZER_CONFIG).get("chat_template"))


def raise_if_unfit(directory: Path) -> None:
    """Judge the configuration of a source. Of its weights, only names and types are read, if they are here.

    Raises:
        UserError: `verify` would refuse an export with this configuration, or engines would misread it. All problems
            are reported together.
    """
    path = directory / CONFIG
    config = read_config(directory)
    problems = [*_problems(config, token_ids(directory)), *_quantization_problems(config, directory)]
    found = [f"{path}: {problem}." for problem in problems]
    if found:
        raise user_errors(found)


def _problems(config: Mapping[str, object], tokens: Mapping[str, int]) -> Iterator[str]:
    for key, value in CONSTANTS.items():
        if key in config and config[key] != value:
            yield f"{key} is {config[key]!r}, but gpt-oss has {value!r}, which engines assume. Correct it"
    sizes = {key: config.get(key) for key in _SIZES}
    bad = [f"{key}={value!r}" for key, value in sizes.items() if type(value) is not int or value < 1]
    if bad:
        yield f"{', '.join(bad)}: must be a positive whole number, as in the original model's {CONFIG}"
    yield from _expert_problems(config)
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if types is not None and isinstance(layers, int) and types != layer_types(layers):
        yield "layer_types do not alternate from sliding_attention to full_attention, as engines assume. Correct them"
    yield from _rope_problems(config)
    yield from _token_problems(config, tokens)


def _expert_problems(config: Mapping[str, object]) -> Iterator[str]:
    active, experts = config.get("num_experts_per_tok"), config.get("num_local_experts")
    if isinstance(active, int) and isinstance(experts, int) and active > experts:
        yield f"num_experts_per_tok={active} is more than num_local_experts={experts}. Correct it"
    if (other := config.get("experts_per_token", active)) != active:
        yield f"experts_per_token={other!r}, but num_experts_per_tok={active!r}. Engines read either. Correct one"


def _rope_problems(config: Mapping[str, object]) -> Iterator[str]:
    scaling, theta = rope_of(config)
    missing = [key for key in ROPE_KEYS if key not in scaling] + ([] if theta is not None else ["rope_theta"])
    if missing:
        yield (
            f"rope_scaling and rope_parameters lack {', '.join(missing)}, so the context would be wrong. Copy"
            f" rope_scaling and rope_theta from the original model's {CONFIG}"
        )
    elif scaling["rope_type"] != "yarn":
        yield f"rope_type is {scaling['rope_type']!r}, but gpt-oss has 'yarn', which engines assume. Correct it"


def _token_problems(config: Mapping[str, object], tokens: Mapping[str, int]) -> Iterator[str]:
    end, pad = config.get("eos_token_id"), config.get("pad_token_id")
    if RETURN in tokens and tokens[RETURN] not in (end if isinstance(end, list) else [end]):
        yield f"eos_token_id is {end!r}, but {RETURN} has the id {tokens[RETURN]} in {TOKENIZER}. Correct it"
    if type(pad) is not int:
        yield f"pad_token_id is {pad!r}, not an id. Set it to the id of <|endoftext|>, {tokens.get('<|endoftext|>')}"


def _quantization_problems(config: Mapping[str, object], directory: Path) -> Iterator[str]:
    """Compare quantization_config with the stored weights, if they are here."""
    is_stated, stored = is_quantized(config), find_storage(directory)
    if is_stated and stored is Storage.plain:
        yield (
            "quantization_config says that the experts are MXFP4, but they are stored as plain weights. Delete"
            " quantization_config, which is left over from another model"
        )
    if not is_stated and stored is Storage.packed:
        yield (
            "has no quantization_config, but the experts are stored as MXFP4. Copy quantization_config from"
            f" {CONFIG} of openai/gpt-oss-20b"
        )
