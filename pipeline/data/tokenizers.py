"""Loads the tokenizer of a model directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, overload

from pipeline.checkpoints.config_json import read_config
from pipeline.errors import UserError

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
            model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(directory))  # transformers declares a less exact type
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).strip().splitlines()[0]}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    vocabulary = read_config(directory)["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, but the model has only {vocabulary}.")
    return tokenizer
