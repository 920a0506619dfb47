"""The tokenizer of a model directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.checkpoints.config_json import read_config
from pipeline.errors import UserError


class Tokenizer(Protocol):
    """What this program uses of a transformers tokenizer, so that signatures can name it without importing it."""

    chat_template: str | None
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...
    @property
    def backend_tokenizer(self) -> Any: ...
    def __len__(self) -> int: ...
    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def pad(self, encoded_inputs: Any, **options: Any) -> Any: ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Raises:
        UserError: there is no tokenizer, it has no chat template, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)  # one of several classes
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).strip().splitlines()[0]}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    vocabulary = read_config(directory)["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}.")
    return tokenizer
