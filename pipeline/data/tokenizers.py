"""Loads the tokenizer of a model directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, overload

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.errors import UserError
from pipeline.runs.foreign_files import read_utf8

O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression that splits text into words for the tokenizer o200k.

It comes from OpenAI's tiktoken. llama.cpp calls it `gpt-4o`.
"""

_JSON_FILES = (
    *(CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.json"),
)
_MOST_TEMPLATE_BYTES = 1 << 20  # gpt-oss' chat template has 16 KiB

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import BatchEncoding


class Tokenizer(Protocol):
    """A transformers tokenizer, with only the methods and attributes that this program uses.

    It is a protocol, so modules can use this type without importing transformers.
    """

    chat_template: str | None
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...
    @property
    def backend_tokenizer(self) -> "FastTokenizer": ...
    def __len__(self) -> int: ...
    def __call__(self, text: list[str], **options: object) -> Mapping[str, list[list[int]]]: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> str: ...
    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **options: object) -> str: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def pad(self, encoded_inputs: Mapping[str, object], **options: object) -> "BatchEncoding": ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Raises:
        UserError: the directory has no tokenizer, the tokenizer has no chat template, or it has more tokens than the
            model. Or one of the files that transformers reads is damaged.
    """
    from transformers import AutoTokenizer

    _raise_if_no_json(directory)
    # transformers and the library `tokenizers`, which is written in Rust, raise any kind of error for a damaged file.
    try:
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(directory))  # transformers declares a less exact type
    except Exception as error:
        raise UserError(f"{directory}: no usable tokenizer ({_first_line(error)}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{directory}: the tokenizer has several chat templates. Keep one, in chat_template.jinja.")
    vocabulary = read_config(directory)["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, but the model has only {vocabulary}.")
    return tokenizer


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read the tokens of a tokenizer.json, text -> id. The directory need not hold a model.

    Raises:
        UserError: the file is damaged.
    """
    from tokenizers import Tokenizer as FastTokenizer

    read_config(path.parent, path.name)
    try:
        return FastTokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library is written in Rust, and raises plain exceptions
        raise UserError(f"{path}: no usable tokenizer ({_first_line(error)}).") from error


def _raise_if_no_json(directory: Path) -> None:
    """Check the files that the tokenizer, or a model that is loaded later, is made from.

    Raises:
        UserError: one of them is not a JSON object, is too large, is not in UTF-8, or is not a regular file.
    """
    for name in _JSON_FILES:
        if (directory / name).exists():
            read_config(directory, name)
    for path in sorted(directory.glob("*.jinja")):
        read_utf8(path, _MOST_TEMPLATE_BYTES)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]:.300}" if text else type(error).__name__
