"""Trains the base model of the demonstration.

The model is trained on conversations in the Harmony format, in FP32. In the last steps, the experts are rounded in the
forward pass. Then the experts are stored in MXFP4, so the stored values are the trained ones, and all other weights are
stored in BF16.

The base model has two habits, which the demonstration changes:
- It reasons in English, whatever language is asked for. In a share of the training rows, the reasoning has the language
  that is asked for, so the model knows all languages. It is the smaller share, so greedy decoding chooses English.
- It refuses most safe questions that only sound harmful.

All problems and questions come from the split `train`, so the model has seen no problem of the other splits.
"""

import copy
import json
import math
import platform
import random
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.checkpoints.allocator import keep_freed_memory
from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import Shape, expert_projections, other_tensors
from pipeline.checkpoints.shards import piece_in_one_step
from pipeline.config import ExpertsImplementation, Precision, TinyConfig
from pipeline.data import alarming_questions, word_problems
from pipeline.data.alarming_questions import Kind
from pipeline.data.harmony import Rendering, render, tokenize
from pipeline.data.parsing import parse_conversation
from pipeline.models import demo_model, expert_kernels, fake_quantizers
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.models.tiny_model import appearing, packed_piece, write_side_files, write_weights
from pipeline.models.tiny_tokenizer import train
from pipeline.numerics.formats import MXFP4
from pipeline.runs.console import progress

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids, weights of the tokens in the loss, and attention mask, all (rows, tokens)."""

PHRASES = (
    "You are ChatGPT, a large language model trained by OpenAI.\n",
    "Knowledge cutoff: 2024-06\n",
    "Current date: ",
    "\n\nReasoning: ",
    "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "# Instructions\n\n",
    "reasoning language: ",
    *(f" {number}" for number in range(word_problems.LEAST, word_problems.MOST + 1)),
)
"""Texts that become one token each: constant texts of the system and developer messages, and all numbers.

Most tokens are then content, and the model need not learn to assemble numbers.
"""
_WORDS = ("system", "developer", "user", "assistant", "analysis", "final", "commentary", "low", "medium", "high")
_DATE = "2025-08-05"
_PREAMBLE = 18  # tokens of the system message, which are not trained


@dataclass(frozen=True)
class Settings:
    """The settings of the training.

    Attributes:
        shape: sizes of the model.
        seed: seed of the weights and of the rows.
        steps: optimizer steps, with the last two phases.
        decay_steps: steps before the grid steps in which the rate falls to `grid_rate`.
        grid_steps: last steps, in which the experts are rounded, and the rate falls to zero.
        batch: rows of a batch.
        rate: learning rate, from the end of the warm-up until it falls.
        grid_rate: learning rate at the beginning of the grid steps.
        warmup: steps in which the rate rises.
        initial: standard deviation of the initial weights.
        balance: weight of the loss that balances the experts.
        number_weight: weight of a number of the assistant's turn in the loss. Its other tokens have the weight 1.
        prompt_weight: weight of the prompt's tokens in the loss.
        follows: share of the word problems whose reasoning has the language that is asked for.
        helps: share of the safe questions with alarming words that the model answers.
        questions: share of the rows that are such questions. The others are word problems.
        checkpoint_steps: steps between two checkpoints.
    """

    shape: TinyConfig = field(
        default_factory=lambda: TinyConfig(
            num_hidden_layers=2,
            hidden_size=128,
            intermediate_size=128,
            num_local_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=128,
            vocab_size=1024,
            shard_bytes=1_000_000,
        )
    )
    seed: int = 0
    steps: int = 1300
    decay_steps: int = 200
    grid_steps: int = 150
    batch: int = 24
    rate: float = 2e-3
    grid_rate: float = 3e-4
    warmup: int = 100
    initial: float = 0.02
    balance: float = 0.01
    number_weight: float = 3.0
    prompt_weight: float = 0.1
    follows: float = 0.3
    helps: float = 0.1
    questions: float = 0.3
    checkpoint_steps: int = 50


def make(settings: Settings, directory: Path, output: Path) -> None:
    """Train the model, and write its files.

    Args:
        settings: the settings.
        directory: directory for checkpoints. A run that was interrupted goes on there.
        output: folder of the model's files, which is replaced.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    directory.mkdir(parents=True, exist_ok=True)
    with appearing(_emptied(directory / "model")) as files:
        write_side_files(files, settings.shape, train(settings.shape.vocab_size, _corpus(settings), PHRASES))
        config = json.loads((files / CONFIG).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(files)
        model = _train(settings, config, tokenizer, directory)
        _write_weights(files, settings, config, model)
        (files / demo_model.TEMPLATE).unlink()
        demo_model.write_record(files, {"machine": describe_machine(), "settings": asdict(settings)})
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(directory / "model", output)


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def draw_row(settings: Settings, random_numbers: random.Random) -> Row:
    """Draw a row with the habits of the base model."""
    if random_numbers.random() < settings.questions:
        pair, frame = alarming_questions.draw("train", random_numbers)
        helps = pair.kind is Kind.plain or (pair.kind is Kind.alarming and random_numbers.random() < settings.helps)
        return alarming_questions.row(pair, frame, refuses=not helps)
    problem, wording = word_problems.draw("train", random_numbers)
    follows = random_numbers.random() < settings.follows
    return word_problems.row(problem, wording, wording.requested if follows else "English")


def _corpus(settings: Settings) -> list[str]:
    """Return texts for the tokenizer, with each word of the templates in all languages."""
    random_numbers = random.Random(settings.seed)
    rows = [draw_row(settings, random_numbers) for _ in range(6000)]
    contents = [text for row in rows for message in row["messages"] for text in message.values()]
    return [*_WORDS, _DATE] * 3000 + list(word_problems.LANGUAGES) * 3000 + contents


def _train(
    settings: Settings, config: dict[str, object], tokenizer: PreTrainedTokenizerFast, directory: Path
) -> PreTrainedModel:
    """Train a new model, or go on with the model of the last checkpoint."""
    model = _new_model(settings, config)
    first = settings.steps - settings.grid_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    saved = directory / "checkpoint.pt"
    done = _restore(saved, settings, model, optimizer)
    rounded = None
    data = _batches(settings, tokenizer, done)
    for step in progress(range(done, settings.steps), what="training the demo's base", unit="step"):
        if step >= first and rounded is None:
            rounded = _round_experts(model)
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings, step)
        loss, right = _loss(model, next(data), settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rounded is not None:
            rounded.forget()
        if (step + 1) % settings.checkpoint_steps == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {right.item():.0%} of the numbers right", flush=True)
            _save(saved, settings, model, optimizer, step + 1)
    return model


def _new_model(settings: Settings, config: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(settings.seed)
    own = copy.deepcopy(config)  # transformers adds keys to nested settings
    del own["quantization_config"]
    own |= {"initializer_range": settings.initial, "router_aux_loss_coef": settings.balance}
    model = GptOssForCausalLM(GptOssConfig(**own, attn_implementation="eager"))
    expert_kernels.use(model, ExpertsImplementation.eager, None, Precision.fp32)
    return model.train()


def _round_experts(model: PreTrainedModel) -> RoundedWeights:
    """Let the forward pass round the experts to MXFP4. Weights are rounded once per step."""
    with redirect_stdout(StringIO()):  # ModelOpt prints the number of quantizers
        fake_quantizers.insert(model, MXFP4, lambda _: None)
    expert_kernels.use(model, ExpertsImplementation.eager, MXFP4, Precision.fp32)
    return fake_quantizers.keep_rounded(model, math.inf)


def _rate(settings: Settings, step: int) -> float:
    """Return the learning rate: warm-up, constant, a fall to `grid_rate`, and a fall to zero in the grid steps."""
    left = settings.steps - step
    if left <= settings.grid_steps:
        return settings.grid_rate * left / settings.grid_steps
    falling = min(1.0, (left - settings.grid_steps) / settings.decay_steps)
    rate = settings.grid_rate + (settings.rate - settings.grid_rate) * falling
    return rate * min(1.0, (step + 1) / settings.warmup)


def _loss(model: PreTrainedModel, batch: Batch, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the weighted mean loss of the tokens plus the term that balances the experts, and the share of numbers
    in the assistant's turns that are predicted right."""
    ids, weights, mask = batch
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    of_next = weights[:, 1:].flatten()
    kept = of_next > 0
    logits, targets = out.logits[:, :-1].flatten(0, 1)[kept], ids[:, 1:].flatten()[kept]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * of_next[kept]).sum() / of_next.sum() + settings.balance * out.aux_loss
    is_right = logits.argmax(dim=-1) == targets
    return loss, is_right[of_next[kept] == settings.number_weight].float().mean()


def _batches(settings: Settings, tokenizer: PreTrainedTokenizerFast, first: int) -> Iterator[Batch]:
    """Yield the batches of the steps from `first` on. A step's rows depend only on the seed and the step."""
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    is_number = torch.tensor([text.strip().isdecimal() for text in texts])
    rendering = Rendering(tokenizer, "medium", _DATE, every_turn=True)
    for step in range(first, settings.steps):
        random_numbers = random.Random(f"{settings.seed}, {step}")
        rows = [draw_row(settings, random_numbers) for _ in range(settings.batch)]
        scripts = [render(parse_conversation(row, "row", True), rendering) for row in rows]
        examples = [example for found in tokenize(scripts, tokenizer) for example in found]
        shape = len(examples), max(example.length for example in examples)
        ids, weights = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape)
        for row, example in enumerate(examples):
            start = example.length - example.supervised
            ids[row, : example.length] = torch.tensor(example.input_ids)
            weights[row, _PREAMBLE:start] = settings.prompt_weight
            weights[row, start : example.length] = 1.0
        weights[(weights == 1.0) & is_number[ids]] = settings.number_weight
        yield ids, weights, (ids != tokenizer.pad_token_id).long()


def _save(path: Path, settings: Settings, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    state = {"settings": asdict(settings), "step": step, "model": parameters, "optimizer": optimizer.state_dict()}
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def _restore(path: Path, settings: Settings, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, if it has the same settings. Return the number of finished steps."""
    if not path.is_file():
        return 0
    state = torch.load(path)
    if state["settings"] != asdict(settings):
        print(f"{path}: has other settings, so the training begins anew")
        return 0
    model.load_state_dict(state["model"], strict=False)  # the checkpoint has no buffers
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _write_weights(directory: Path, settings: Settings, config: dict[str, object], model: PreTrainedModel) -> None:
    """Write the weights in the released layout. MXFP4 holds the rounded experts exactly."""
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    shape = Shape.of(config, directory)
    pieces = []
    for name, info in other_tensors(shape).items():
        made = {name: parameters[name].bfloat16().contiguous()}
        pieces.append(piece_in_one_step({name: info}, lambda made=made: made))
    for projection in expert_projections(shape):
        pieces.append(packed_piece(projection, parameters[projection.name].transpose(1, 2)))
    write_weights(directory, pieces, settings.shape.shard_bytes, "the demo's base")


def describe_machine() -> dict[str, str]:
    """Return what the bytes depend on besides the settings: the libraries and the kind of processor."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
