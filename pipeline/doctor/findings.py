"""What in the figures will hurt, and what to do about it: a table of checks, the most serious first."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config import Method, Sharding, Stage
from pipeline.doctor.needs import Plan
from pipeline.models.sharding import STRATEGIES
from pipeline.runs.run import Run

_FEW_ROWS = 20
_MOST_HELD_OUT = 0.5
_ROUND = 64
Figures = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a check may look at: figures of the data, needs of the run, free resources, the settings, and the run."""

    data: Figures
    needs: Figures
    machine: Figures
    plan: Plan
    run: Run


def findings(facts: Facts) -> list[str]:
    """One message for each thing that is wrong, the most serious first."""
    return [message for check in _CHECKS for message in check(facts)]


def gigabytes(size: float) -> str:
    """`13.8 GB`, with decimal units as disks have; small sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def disk_needed(facts: Facts) -> int:
    """Bytes that the stages not yet made will take at most, the checkpoints of one training stage among them."""
    todo = [name for name in facts.needs["disk_bytes"] if not facts.run.is_complete(Stage[name])]
    resumable = [size for name, size in facts.needs["checkpoint_bytes"].items() if name in todo]
    return sum(facts.needs["disk_bytes"][name] for name in todo) + max(resumable, default=0)


def device_needed(facts: Facts, stage: str) -> int:
    """Bytes on each device while a stage trains; what `sharding` splits, processes share."""
    needed = facts.needs["device_bytes"][stage]
    split = sum(needed[part] for part in STRATEGIES[facts.plan.sharding].sharded)
    return needed["total"] - split + split // facts.machine["processes"]


def host_needed(facts: Facts) -> int:
    """Bytes in host memory: the weights, whole in every process at first, or all of training where there is no GPU."""
    each = [needed["weights"] for needed in facts.needs["device_bytes"].values()]
    if not facts.machine["gpus"]:
        each += [device_needed(facts, stage) for stage in facts.needs["device_bytes"]]
    return facts.machine["processes"] * max(each)


def _device_too_small(facts: Facts) -> list[str]:
    if not facts.machine["gpus"]:
        return []
    free = facts.machine["gpu_free_bytes"]
    return [
        f"{stage} needs about {gigabytes(needed)} on each GPU, of which {gigabytes(free)} are free:"
        f" {_less_memory(facts, stage)}."
        for stage in facts.needs["device_bytes"]
        if (needed := device_needed(facts, stage)) > free
    ]


def _host_too_small(facts: Facts) -> list[str]:
    needed, free = host_needed(facts), facts.machine["host_free_bytes"]
    if needed <= free:
        return []
    what = "loading the weights" if facts.machine["gpus"] else "training, without a GPU,"
    largest = max(facts.needs["device_bytes"].items(), key=lambda item: item[1]["total"])[0]
    remedy = "use fewer processes or a machine with more" if facts.machine["gpus"] else _less_memory(facts, largest)
    return [f"{what} needs about {gigabytes(needed)} of host memory, of which {gigabytes(free)} are free: {remedy}."]


def _disk_too_small(facts: Facts) -> list[str]:
    needed, free = disk_needed(facts), facts.machine["disk_free_bytes"]
    if needed <= free:
        return []
    return [
        f"run_dir={facts.run.config.run_dir}: the stages to come take up to {gigabytes(needed)} of disk, of which"
        f" {gigabytes(free)} are free: set run_dir to a larger disk, or lower sft.save_total_limit and"
        " qat.save_total_limit."
    ]


def _other_tokens(facts: Facts) -> list[str]:
    parity = facts.data["parity"]
    if not parity.get("differ"):
        return []
    first = parity["first"]
    return [
        f"examples with other tokens than openai-harmony gives: {parity['differ']} of {parity['examples']}, first"
        f" {first['where']} at token {first['position']}: {first['ours']!r} for {first['theirs']!r}. Engines would ask"
        " the model what it was not trained on: use the released tokenizer and chat template in model.path."
    ]


def _leaks(facts: Facts) -> list[str]:
    leaks = facts.data["leaks"]
    if not leaks["normalized"]:
        return []
    return [
        f"validation rows whose prompt is trained on too, so that validation loss measures memory:"
        f" {leaks['normalized']} of {facts.data['rows']['validation']} ({leaks['exact']} word for word):"
        f" {_and_more(leaks['first'], leaks['normalized'])}. Keep one row of each prompt in data.path."
    ]


def _control_text(facts: Facts) -> list[str]:
    found = facts.data["control_text"]
    if not found["rows"]:
        return []
    tokens = ", ".join(f"{token} ({count})" for token, count in list(found["rows_by_token"].items())[:5])
    return [
        f"rows with control tokens of a chat format in their text, which the model will learn to write:"
        f" {found['rows']}, {tokens}; {_and_more(found['first'], found['rows'])}. Take them out of data.path;"
        " reasoning belongs into 'thinking'."
    ]


def _nothing_to_learn(facts: Facts) -> list[str]:
    found = facts.data["nothing_to_learn"]
    if not found["examples"]:
        return []
    return [
        f"examples left out, since data.max_length={facts.plan.data.max_length} cuts away all their supervised"
        f" tokens: {found['examples']}; {_and_more(found['first'], found['examples'])}. {_longer(facts)}"
    ]


def _cut(facts: Facts) -> list[str]:
    cut = facts.data["cut"]
    if not cut["supervised_tokens_lost"]:
        return []
    return [
        f"examples cut at data.max_length={cut['max_length']}: {cut['examples']}, which lose"
        f" {cut['supervised_share_lost']:.1%} of all supervised tokens, and the token that stops them;"
        f" {_and_more(cut['first'], cut['rows'])}. {_longer(facts)}"
    ]


def _no_reasoning(facts: Facts) -> list[str]:
    found = facts.data["reasoning"]
    if not found["turns_without"]:
        return []
    return [
        f"assistant turns without reasoning, which teach the model to answer without: {found['turns_without']} of"
        f" {found['turns']}; {_and_more(found['first'], found['turns_without'])}. Give it as 'thinking'; where there is"
        " none, say so with the row's reasoning_effort or data.reasoning_effort=low."
    ]


def _copies(facts: Facts) -> list[str]:
    found = facts.data["copies"]
    if not found["rows"]:
        return []
    return [
        f"rows that copy another, each counting as one more: {found['rows']};"
        f" {_and_more(found['first'], found['rows'])}. Remove them from data.path, unless that is meant."
    ]


def _few_to_validate(facts: Facts) -> list[str]:
    rows, data = facts.data["rows"], facts.plan.data
    if rows["validation"] >= _FEW_ROWS:
        return []
    chosen = rows["train"] + rows["validation"]
    fraction = math.ceil(100 * _FEW_ROWS / chosen) / 100
    remedy = f"Set data.validation_fraction={fraction}" if fraction <= _MOST_HELD_OUT else "Use more rows"
    return [
        f"rows held out by data.validation_fraction={data.validation_fraction}: {rows['validation']}, so that"
        f" validation loss is mostly noise. {remedy}."
    ]


def _less_memory(facts: Facts, stage: str) -> str:
    """The settings that take most of it away, as far as they are not set already."""
    train = facts.plan.trainings[stage]
    needed = facts.needs["device_bytes"][stage]
    found = [] if train.method is Method.lora else [f"train@{stage}=lora"]
    found += [] if train.gradient_checkpointing else [f"{stage}.gradient_checkpointing=true"]
    found += [f"{stage}.batch_size=1"] if train.batch_size > 1 else []
    found += [f"{stage}.rounded_cache_gib=0"] if needed["rounded"] else []
    if needed["activations"] > needed["total"] / 4:
        found.append(f"data.max_length={max(_ROUND, facts.needs['tokens'] // 2)}")
    if facts.machine["gpus"] and facts.plan.sharding is Sharding.none:
        found.append("sharding=fsdp2 on several GPUs")
    return f"use {', '.join(found)}" if found else "it needs a larger machine"


def _longer(facts: Facts) -> str:
    longest = facts.data["lengths"]["longest"]
    return f"data.max_length={-(-longest // _ROUND) * _ROUND} keeps everything, at the cost of memory."


def _and_more(first: list[str], total: int) -> str:
    return "; ".join(first) + (", …" if total > len(first) else "")


_CHECKS: tuple[Callable[[Facts], list[str]], ...] = (
    _device_too_small,
    _host_too_small,
    _disk_too_small,
    _other_tokens,
    _leaks,
    _control_text,
    _nothing_to_learn,
    _cut,
    _no_reasoning,
    _copies,
    _few_to_validate,
)
"""Most serious first: what cannot run, what makes figures lie, what teaches the wrong thing, what wastes."""
