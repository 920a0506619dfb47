"""The tokenizer of a model directory."""

from pathlib import Path
from typing import Any

from pipeline.checkpoints.config_json import read_config
from pipeline.errors import UserError


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: there is no tokenizer, it has no chat template, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).strip().splitlines()[0]}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    vocabulary = read_config(directory)["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}.")
    return tokenizer
