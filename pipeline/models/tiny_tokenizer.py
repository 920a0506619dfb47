"""Make the tokenizer of a random model: a small trained one, or the released one from its vocabulary file."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS
from pipeline.data.synthetic import chat_template
from pipeline.data.tokenizers import O200K_WORDS
from pipeline.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTEXT = 131_072
"""Largest number of tokens of a conversation, as in the released models."""

_RESERVED_ROWS = 16  # embedding rows that belong to no token; the released models have such rows too


def write(tokenizer: "PreTrainedTokenizerFast", directory: Path, vocab_size: int) -> dict[str, int]:
    """Write a tokenizer into a model's directory. Return the ids of the Harmony special tokens.

    Args:
        tokenizer: the tokenizer, made by `train` or `make_released`.
        directory: directory of the model.
        vocab_size: number of rows of the model's embedding.

    Raises:
        UserError: the embedding is too small for the tokenizer.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(f"model.tiny.vocab_size={vocab_size}: must be at least {len(tokenizer)} with this tokenizer.")
    tokenizer.save_pretrained(directory)
    ids = tokenizer.get_vocab()
    return {token: ids[token] for token in SPECIAL_TOKENS.values()}


def make_released(ranks: Path) -> "PreTrainedTokenizerFast":
    """Make the released models' tokenizer from the file `o200k_base.tiktoken`.

    Raises:
        UserError: the file is missing, or another vocabulary.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if not ranks.is_file():
        raise UserError(f"{ranks}: there is no such file. Give the file o200k_base.tiktoken of openai-harmony.")
    converter = TikTokenConverter(str(ranks), pattern=O200K_WORDS, extra_special_tokens=list(_special_tokens()))
    tokenizer = _wrap(converter.converted())
    if any(tokenizer.convert_tokens_to_ids(token) != i for i, token in SPECIAL_TOKENS.items()):
        raise UserError(f"{ranks}: this is not the vocabulary o200k_base. Give the file o200k_base.tiktoken.")
    return tokenizer


def train(vocab_size: int, corpus: Iterable[str], phrases: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on texts, and add phrases and the Harmony special tokens.

    Args:
        vocab_size: number of rows of the model's embedding.
        corpus: texts to train on.
        phrases: texts that become one token each.

    Raises:
        UserError: the embedding is too small for all bytes, phrases and special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    added = len(SPECIAL_TOKENS) + len(phrases) + _RESERVED_ROWS
    if vocab_size < 256 + added:
        raise UserError(f"model.tiny.vocab_size={vocab_size}: must be at least {256 + added}.")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}{1,3}|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.add_special_tokens(list(_special_tokens()))
    return _wrap(tokenizer)


def _special_tokens() -> Iterable[str]:
    return (SPECIAL_TOKENS[i] for i in sorted(SPECIAL_TOKENS))


def _wrap(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )
    wrapped.chat_template = chat_template()
    return wrapped
