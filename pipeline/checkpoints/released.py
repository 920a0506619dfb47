"""States what the configuration of a gpt-oss checkpoint must say, so that every engine reads the model in the same way.

The statement follows config.json of openai/gpt-oss-20b and -120b. It does not use the code that writes exports, so
`verify` can check that code with it. Sources are judged by the same statement before any work begins.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG, is_quantized, read_config
from pipeline.checkpoints.config_keys import ROPE_KEYS
from pipeline.checkpoints.recognition import Storage, find_storage
from pipeline.checkpoints.side_files import CHAT_TEMPLATES, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
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
_ROPE_FORMS = ("rope_parameters", "rope_scaling")
_OF_NO_MEANING: Mapping[str, object] = {"type": "yarn", "partial_rotary_factor": 1.0}
"""Further keys of the rope forms -> the value with which they change nothing."""
RETURN, CALL = "<|return|>", "<|call|>"
_STOPS = {RETURN: "answers do not end", CALL: "generation goes on after a tool call"}
"""Stop token -> the consequence if generation_config.json lacks it."""
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
    path = directory / TOKENIZER
    try:
        state = path.stat()
        return _read_tokens(path, state.st_mtime_ns, state.st_size)
    except (OSError, UserError, KeyError, TypeError):
        return {}


@lru_cache(maxsize=4)
def _read_tokens(path: Path, _time: int, _size: int) -> dict[str, int]:
    """Read the special tokens. The file of a released model has 28 MB, so the last results are kept."""
    return {token["content"]: token["id"] for token in read_json(path)["added_tokens"]}


def has_chat_template(directory: Path) -> bool:
    """Return whether a directory has a chat template, in a file of its own or in tokenizer_config.json."""
    if any((directory / name).is_file() for name in CHAT_TEMPLATES):
        return True
    path = directory / TOKENIZER_CONFIG
    return path.is_file() and bool(read_config(directory, TOKENIZER_CONFIG).get("chat_template"))


def stop_problems(directory: Path, base: Path | None = None) -> list[str]:
    """Find stop tokens that generation_config.json must have, but lacks.

    `<|return|>` must be there. If the base model's file has `<|call|>`, this must be there, too. A model without the
    file or without a tokenizer has no problem.

    Args:
        directory: directory of the model.
        base: directory of the base model, or None.
    """
    needed = [RETURN, *([CALL] if base is not None and _stops_at(base, CALL) else [])]
    tokens = token_ids(directory) or ({} if base is None else token_ids(base))
    stops, path = _stop_ids(directory), directory / GENERATION_CONFIG
    return [
        f"{path}: eos_token_id is {stops!r}, but must have {tokens[token]} ({token}), or {_STOPS[token]}. Add it to the"
        f" {GENERATION_CONFIG} of the model that is served, trained or exported, or copy the original model's file"
        for token in needed
        if stops is not None and token in tokens and tokens[token] not in stops
    ]


def describe_missing_stop(directory: Path) -> str | None:
    """Return a remark about a model whose generation_config.json does not stop at tool calls, or None."""
    stops = _stop_ids(directory)
    if stops is None or CALL not in token_ids(directory) or _stops_at(directory, CALL):
        return None
    return (
        f"{directory / GENERATION_CONFIG}: eos_token_id is {stops!r}, without {CALL}, so {_STOPS[CALL]}. Exports have"
        " this file. If the model will call tools, copy the released model's file"
    )


def _stop_ids(directory: Path) -> list[object] | None:
    """Return `eos_token_id` of generation_config.json as a list, or None if there is no such file."""
    if not (directory / GENERATION_CONFIG).is_file():
        return None
    stops = read_config(directory, GENERATION_CONFIG).get("eos_token_id")
    return stops if isinstance(stops, list) else [stops]


def _stops_at(directory: Path, token: str) -> bool:
    return token_ids(directory).get(token, token) in (_stop_ids(directory) or [])


def raise_if_unfit(directory: Path) -> None:
    """Judge the configuration of a source. If its weights are here, their names and types are read.

    Raises:
        UserError: `verify` would refuse an export with this configuration, or engines would misread it. All problems
            are reported together.
    """
    path = directory / CONFIG
    config = read_config(directory)
    problems = [*_problems(config, token_ids(directory)), *_quantization_problems(config, directory)]
    found = [f"{path}: {problem}." for problem in problems]
    found += [f"{problem}." for problem in stop_problems(directory)]
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
    yield from _rope_contradictions(config)


def _rope_contradictions(config: Mapping[str, object]) -> Iterator[str]:
    """Find keys with two values, and keys that gpt-oss does not have. Engines differ in the form that they read."""
    forms = {name: form for name in _ROPE_FORMS if isinstance(form := config.get(name), Mapping)}
    places = {name: {key: value for key, value in form.items() if value is not None} for name, form in forms.items()}
    theta = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    for key in (*ROPE_KEYS, "rope_theta"):
        found = {f"{name}.{key}": form[key] for name, form in places.items() if key in form}
        found |= theta if key == "rope_theta" else {}
        if len({*map(repr, map(_plain, found.values()))}) > 1:
            values = " and ".join(f"{name}={value!r}" for name, value in found.items())
            yield f"{values} contradict each other. Some engines read the one, some the other. Correct one"
    for name, form in places.items():
        for key in sorted(form.keys() - {*ROPE_KEYS, "rope_theta"}):
            if form[key] != _OF_NO_MEANING.get(key):
                yield f"{name}.{key} is {form[key]!r}, but gpt-oss has no such key, and engines ignore it. Remove it"


def _plain(value: object) -> object:
    """Return a number as a float, so that 32 equals 32.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
