"""Find problems in the figures, and advise how to solve them. The most serious problems come first."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

from pipeline.checkpoints.largest_codes import CodeFigures
from pipeline.config import RenderingForm, Stage
from pipeline.config.engines import engines_that_render
from pipeline.doctor import remedies
from pipeline.doctor.content import ControlTextFigures, CopyFigures, ReasoningFigures, ToolFigures, UntrainedFigures
from pipeline.doctor.leaks import LeakFigures
from pipeline.doctor.needs import ControlFigures, NeedFigures
from pipeline.doctor.parity import ParityFigures
from pipeline.doctor.plan import Plan
from pipeline.doctor.renderings import RenderingFigures
from pipeline.doctor.rows import Lengths, NothingToLearn, TokenCounts, Truncated
from pipeline.runs import controls
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run

_FEW_ROWS = 20
_MOST_HELD_OUT = 0.5
_ROUND = 64


class RowCounts(TypedDict):
    """Numbers of rows: in total, for training, and for validation."""

    all: int
    train: int
    validation: int


class ValidationFigures(TypedDict):
    """Figures of the validation rows alone, and `source`: the path and split of their data set."""

    source: str
    rows: int
    tokens: TokenCounts
    lengths: Lengths
    cut: Truncated


class UnusedFigures(TypedDict):
    """Lines about columns and keys that are not used: those that may matter, and harmless ones."""

    warnings: list[str]
    remarks: list[str]


class DataFigures(TypedDict):
    """Figures of the data in artifact.json. Each part is defined in the module of this package that computes it."""

    rows: RowCounts
    tokens: TokenCounts
    lengths: Lengths
    cut: Truncated
    nothing_to_learn: NothingToLearn
    reasoning: ReasoningFigures
    reasoning_effort: dict[str, int]
    tools: ToolFigures
    control_text: ControlTextFigures
    copies: CopyFigures
    leaks: LeakFigures
    languages: dict[str, dict[str, int]]
    parity: ParityFigures
    untrained: UntrainedFigures
    rendering: RenderingFigures
    unused: UnusedFigures
    validation: NotRequired[ValidationFigures]
    """Figures of the rows of data.validation. Missing if validation rows are held out."""


@dataclass(frozen=True)
class Facts:
    """Everything that a check may use.

    Attributes:
        data: figures of the data.
        needs: bytes that the run needs.
        machine: free resources of this machine.
        plan: settings of the run.
        model: content of the source's config.json.
        run: the run. Stages that are complete need no further disk space.
        largest_codes: shares of the base's blocks by their largest code, or None if its MXFP4 weights are not here.
    """

    data: DataFigures
    needs: NeedFigures
    machine: Mapping[str, int]
    plan: Plan
    model: Mapping[str, Any]
    run: Run
    largest_codes: CodeFigures | None = None

    @classmethod
    def of(
        cls, report: DoctorRecord, machine: Mapping[str, int], plan: Plan, model: Mapping[str, Any], run: Run
    ) -> "Facts":
        """Combine the figures of a report with the present state of the machine."""
        data, needs = cast(DataFigures, report.data), cast(NeedFigures, report.needs)
        return cls(data, needs, machine, plan, model, run, report.largest_codes)


def findings(facts: Facts) -> list[str]:
    """Return one message for each problem, the most serious first."""
    return [message for check in _CHECKS for message in check(facts)]


def gigabytes(size: float) -> str:
    """Format a number of bytes in decimal units, as for disks: `13.8 GB`, or MB below one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def disk_needed(facts: Facts) -> int:
    """Compute the peak disk usage of the remaining stages, in bytes. Only one of them has checkpoints at a time."""
    todo = [name for name in facts.needs["disk_bytes"] if not facts.run.is_complete(Stage[name])]
    controls = [control for name, control in controls_of(facts).items() if not _is_made(facts.run, name)]
    resumable = [size for name, size in facts.needs["checkpoint_bytes"].items() if name in todo]
    resumable += [control["checkpoint_bytes"] for control in controls]
    sizes = [*(facts.needs["disk_bytes"][name] for name in todo), *(control["disk_bytes"] for control in controls)]
    return sum(sizes) + max(resumable, default=0)


def controls_of(facts: Facts) -> Mapping[str, ControlFigures]:
    """Return the needs of the run's controls, by name."""
    return facts.needs.get("controls", {})


def _is_made(run: Run, control: str) -> bool:
    return any(made.artifact.directory.parent.name == control for made in controls.find_made(run))


def device_needed(facts: Facts, stage: str) -> int:
    """Return the peak bytes on each device while a stage trains."""
    return facts.needs["devices"][stage]["bytes"]


def host_needed(facts: Facts) -> int:
    """Compute how much host memory the processes of this machine need together, in bytes.

    The main process loads the whole model to quantize, evaluate and verify it. Training streams the weights to the
    GPUs. Without a GPU, training takes place in host memory.
    """
    whole = max(needed["weights"] for needed in facts.needs["device_bytes"].values())
    if facts.machine["gpus"]:
        return whole
    training = max(device_needed(facts, stage) for stage in facts.needs["device_bytes"])
    training = max(training, *(control["device_bytes"] for control in controls_of(facts).values()), 0)
    return max(whole, facts.machine["local_processes"] * training)


def _largest_control(facts: Facts) -> str | None:
    """Return the control whose training needs more memory than every stage of the run, or None."""
    name, control = max(controls_of(facts).items(), key=lambda each: each[1]["device_bytes"], default=(None, None))
    stages = max(device_needed(facts, stage) for stage in facts.plan.trainings)
    return name if control is not None and control["device_bytes"] > stages else None


def _device_too_small(facts: Facts) -> list[str]:
    if not facts.machine["gpus"]:
        return []
    free = facts.machine["gpu_free_bytes"]
    return [
        f"{stage} needs {_about(facts, stage)}{gigabytes(needed)} on each GPU, but only {gigabytes(free)} are free."
        f" {_less_memory(facts, stage, free)}."
        for stage in facts.needs["device_bytes"]
        if (needed := device_needed(facts, stage)) > free
    ]


def _device_too_small_for_controls(facts: Facts) -> list[str]:
    if not facts.machine["gpus"]:
        return []
    free = facts.machine["gpu_free_bytes"]
    return [
        f"the control {name} needs about {gigabytes(needed)} on each GPU, but only {gigabytes(free)} are free. It would"
        " stop stage=all after the export. Use a larger GPU or sharding=fsdp2 on several GPUs, or set controls=false."
        for name, control in controls_of(facts).items()
        if (needed := control["device_bytes"]) > free
    ]


def _host_too_small(facts: Facts) -> list[str]:
    needed, free = host_needed(facts), facts.machine["host_free_bytes"]
    if needed <= free:
        return []
    if facts.machine["gpus"]:
        what, remedy = "loading the whole model (quantize, evaluate, verify)", "Use a machine with more host memory"
    elif (control := _largest_control(facts)) is not None:
        what, remedy = f"training the control {control} without a GPU", "Set controls=false"
    else:
        what = "training without a GPU"
        largest = max(facts.plan.trainings, key=lambda stage: device_needed(facts, stage))
        remedy = _less_memory(facts, largest, free // facts.machine["local_processes"])
    return [f"{what} needs about {gigabytes(needed)} of host memory, but only {gigabytes(free)} are free. {remedy}."]


def _disk_too_small(facts: Facts) -> list[str]:
    needed, free = disk_needed(facts), facts.machine["disk_free_bytes"]
    if needed <= free:
        return []
    return [
        f"run_dir={facts.run.config.run_dir}: the remaining stages take up to {gigabytes(needed)} of disk space, but"
        f" only {gigabytes(free)} are free. Set run_dir to a larger disk, or lower sft.save_total_limit and"
        " qat.save_total_limit."
    ]


def _other_tokens(facts: Facts) -> list[str]:
    parity = facts.data["parity"]
    first = parity.get("first")
    if first is None:
        return []
    return [
        f"examples whose tokens differ from openai-harmony's: {parity['differ']} of {parity['examples']}. The first is"
        f" {first['where']}. Around token {first['position']}, it has {first['ours']!r} instead of {first['theirs']!r}."
        " Inference engines would send prompts that the model was not trained on. Use the released tokenizer and chat"
        " template in model.path."
    ]


def _leaks(facts: Facts) -> list[str]:
    leaks = facts.data["leaks"]
    if not leaks["normalized"]:
        return []
    remedy = "Remove them from data.validation, or from the training rows" if facts.plan.data.validation.is_set else ""
    return [
        f"validation rows whose prompt is also in the training rows: {leaks['normalized']} of"
        f" {facts.data['rows']['validation']} ({_and_more(leaks['first'], leaks['normalized'])}). Prompts that are"
        f" equal word for word: {leaks['exact']}. The validation loss of these rows measures memorization."
        f" {remedy or 'Keep one row of each prompt in data.path'}."
    ]


def _control_text(facts: Facts) -> list[str]:
    found = facts.data["control_text"]
    if not found["rows"]:
        return []
    tokens = ", ".join(f"{token} ({count})" for token, count in list(found["rows_by_token"].items())[:5])
    return [
        f"rows whose text contains control tokens of a chat format: {found['rows']}"
        f" ({_and_more(found['first'], found['rows'])}). Rows by token: {tokens}. The model would learn to write these"
        " tokens. Remove them from data.path, and put reasoning into 'thinking'."
    ]


def _nothing_to_learn(facts: Facts) -> list[str]:
    found = facts.data["nothing_to_learn"]
    if not found["examples"]:
        return []
    return [
        f"examples dropped because data.max_length={facts.plan.data.max_length} truncates all their supervised tokens:"
        f" {found['examples']} ({_and_more(found['first'], found['examples'])}). {_longer(facts)}"
    ]


def _truncation(facts: Facts) -> list[str]:
    cut = facts.data["cut"]
    if not cut["supervised_tokens_lost"]:
        return []
    return [
        f"examples truncated at data.max_length={cut['max_length']}: {cut['examples']}"
        f" ({_and_more(cut['first'], cut['rows'])}). They lose {cut['supervised_share_lost']:.1%} of all supervised"
        f" tokens, and the token that ends the answer. {_longer(facts)}"
    ]


def _unused(facts: Facts) -> list[str]:
    return facts.data["unused"]["warnings"]


def _other_rendering(facts: Facts) -> list[str]:
    found = facts.data["rendering"]
    if not found["differ"]:
        return []
    (other,) = (form.name for form in RenderingForm if form.name != found["form"])
    parts = ", ".join(f"{part} in {rows}" for part, rows in found["parts"].items())
    return [
        f"rows that have other tokens with data.rendering={other}: {found['differ']} of {found['compared']}"
        f" ({_and_more(found['first'], found['differ'])}; {parts}). data.rendering={found['form']} gives the tokens of"
        f" {', '.join(engines_that_render(found['form']))}; {other} those of {', '.join(engines_that_render(other))}."
        " Choose the one of your engine."
    ]


def _no_reasoning(facts: Facts) -> list[str]:
    found = facts.data["reasoning"]
    if not found["turns_without"]:
        return []
    return [
        f"assistant turns without reasoning: {found['turns_without']} of {found['turns']}"
        f" ({_and_more(found['first'], found['turns_without'])}). They teach the model to answer without reasoning."
        " Give the reasoning as 'thinking'. If there is none, set the row's reasoning_effort or"
        " data.reasoning_effort to low."
    ]


def _copies(facts: Facts) -> list[str]:
    found = facts.data["copies"]
    if not found["rows"]:
        return []
    return [
        f"rows that copy another row: {found['rows']} ({_and_more(found['first'], found['rows'])}). Each copy gives"
        " its row more weight. If you do not want this, remove the copies from data.path."
    ]


def _few_to_validate(facts: Facts) -> list[str]:
    rows, data = facts.data["rows"], facts.plan.data
    if rows["validation"] >= _FEW_ROWS:
        return []
    if data.validation.is_set:
        return [
            f"rows of data.validation: {rows['validation']}. With so few, the validation loss is mostly noise. Use more"
            " rows."
        ]
    chosen = rows["train"] + rows["validation"]
    fraction = math.ceil(100 * _FEW_ROWS / chosen) / 100
    remedy = f"Set data.validation_fraction={fraction}" if fraction <= _MOST_HELD_OUT else "Use more rows"
    return [
        f"rows held out by data.validation_fraction={data.validation_fraction}: {rows['validation']}. With so few, the"
        f" validation loss is mostly noise. {remedy}."
    ]


def _less_memory(facts: Facts, stage: str, free: int) -> str:
    """List settings that make the stage fit into the free memory. If there are none, list settings that save memory."""
    found = remedies.find(
        facts.plan,
        stage,
        facts.model,
        facts.needs["tokens"],
        processes=facts.machine["processes"],
        gpus=facts.machine["gpus"],
    )
    fitting = [each for each in found if each.bytes <= free]
    if fitting:
        return f"Any of these settings makes it fit: {'; '.join(map(_with_bytes, fitting))}"
    saving = [each for each in found if each.bytes < device_needed(facts, stage)]
    if saving:
        several = sorted(saving, key=lambda each: each.bytes)
        return f"No single setting makes it fit. These save memory: {'; '.join(map(_with_bytes, several))}"
    return "Use a larger machine"


def _with_bytes(remedy: remedies.Remedy) -> str:
    return f"{remedy.setting} ({'' if remedy.is_measured else 'about '}{gigabytes(remedy.bytes)})"


def _about(facts: Facts, stage: str) -> str:
    return "about " if facts.needs["devices"][stage]["estimated_because"] else ""


def _longer(facts: Facts) -> str:
    longest = facts.data["lengths"]["longest"]
    return f"data.max_length={-(-longest // _ROUND) * _ROUND} keeps everything, but takes more memory."


def _and_more(first: list[str], total: int) -> str:
    return "; ".join(first) + (", …" if total > len(first) else "")


_CHECKS: tuple[Callable[[Facts], list[str]], ...] = (
    _device_too_small,
    _device_too_small_for_controls,
    _host_too_small,
    _disk_too_small,
    _unused,
    _other_tokens,
    _leaks,
    _control_text,
    _nothing_to_learn,
    _truncation,
    _no_reasoning,
    _copies,
    _few_to_validate,
    _other_rendering,
)
"""The checks, in the order of their findings.

Problems that stop the run come first. Then come problems that make figures wrong, teach wrong behaviour, or waste data.
"""
