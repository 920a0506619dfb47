"""Print a conversation token by token, and doctor's report: the figures and the findings."""

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from pipeline.checkpoints import largest_codes
from pipeline.config.engines import engines_that_render
from pipeline.data.conversations import Conversation, ConversationError
from pipeline.data.harmony import Rendering, render, tokenize
from pipeline.doctor.facts import DataFigures, Facts, ValidationFigures
from pipeline.doctor.fit import controls_of, device_needed, disk_needed, host_needed
from pipeline.doctor.parity import ParityFigures
from pipeline.doctor.plan import as_batched
from pipeline.doctor.renderings import RenderingFigures
from pipeline.errors import UserError
from pipeline.models.sharding import STRATEGIES
from pipeline.runs.console import say, warn
from pipeline.runs.disk import gigabytes

_PLAIN_WIDTH = 120
_STYLES = {"prompt": ("dim", "dim reverse"), "supervised": ("green", "black on green")}
_BETWEEN = "│"
_BAR = 30
_TITLE = 22
_MOST_EXAMPLES = 8  # that are printed of a conversation
_MOST_TOKENS = 2000  # that are printed at the beginning and at the end of a text


def conversation(row: int, chosen: Conversation, how: Rendering) -> None:
    """Print the last examples of a conversation token by token. Prompt and supervised tokens are on separate lines.

    Only the first and the last tokens of a long text are printed.
    On a terminal, neighbouring tokens have different shades. Elsewhere, a bar separates the tokens.

    Args:
        row: value of doctor.row, used in messages.
        chosen: the conversation of this row, which may be a training or a validation row.
        how: the tokenizer and the settings of the chat template.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    console = _console()
    try:
        script = render(chosen, how)
    except ConversationError as error:
        raise UserError(f"doctor.row={row}: {chosen.where}: {error}.") from error
    omitted = max(0, len(script.turns) - _MOST_EXAMPLES)
    if omitted:
        say("doctor", f"row {row} ({chosen.where}): the first {omitted} examples are not shown")
    (rendered,) = tokenize([replace(script, turns=script.turns[omitted:])], how.tokenizer)
    for number, example in enumerate(rendered, 1 + omitted):
        length, supervised = example.length, example.supervised
        say("doctor", f"row {row} ({chosen.where}), example {number}: {length} tokens, {supervised} supervised")
        start = length - supervised
        for label, ids in (("prompt", example.input_ids[:start]), ("supervised", example.input_ids[start:])):
            tokens = [how.tokenizer.decode([i]).replace("\n", "\\n") for i in _ends(ids)]
            if omitted_tokens := len(ids) - len(tokens):
                tokens.insert(_MOST_TOKENS, f"… {omitted_tokens:,} tokens …")
            _print(console, label, _tokens(label, tokens, console.is_terminal))


def _ends(ids: list[int]) -> list[int]:
    """Return the first and the last tokens of a long text, or all tokens of a short one."""
    return ids if len(ids) <= 2 * _MOST_TOKENS else ids[:_MOST_TOKENS] + ids[-_MOST_TOKENS:]


def report(facts: Facts, timetable: Iterable[tuple[str, str]], findings: list[str]) -> None:
    """Print the figures and the lines of the timetable, then the findings. The most serious finding comes first."""
    console = _console()
    for title, value in (*_data_lines(facts.data), *_base_lines(facts), *_needs_lines(facts), *timetable):
        _print(console, title, Text(value))
    if not findings:
        say("doctor", "no problems found")
    warnings(findings)


def warnings(findings: list[str]) -> None:
    """Print the findings alone, as warnings."""
    for number, finding in enumerate(findings, 1):
        warn("doctor", f"{number}. {finding}")


def _print(console: Console, title: str, text: Text) -> None:
    """Print a title with the text beside it. Lines are not padded, so that logs can be searched and compared."""
    for line in text.wrap(console, max(_TITLE, console.width - _TITLE), overflow="fold"):
        line.rstrip()
        console.print(Text(title.ljust(_TITLE)) + line)
        title = ""


def _tokens(label: str, tokens: list[str], is_terminal: bool) -> Text:
    text = Text(overflow="fold")
    for i, token in enumerate(tokens):
        text.append(token if is_terminal or i == 0 else _BETWEEN + token, _STYLES[label][i % 2])
    return text


def _data_lines(data: DataFigures) -> Iterable[tuple[str, str]]:
    yield from _token_lines(data)
    reasoning, tools, copies, leaks = data["reasoning"], data["tools"], data["copies"], data["leaks"]
    yield "without reasoning", f"{reasoning['turns_without']} of {reasoning['turns']} turns"
    yield "reasoning effort", _counts(data["reasoning_effort"])
    yield (
        "tools",
        f"offered in {tools['rows_that_offer']} rows, called {tools['calls']} times in {tools['rows_that_call']} rows",
    )
    if data["untrained"]["turns"]:
        yield "weight 0", f"{data['untrained']['turns']} turns of {data['untrained']['rows']} rows are not trained"
    for line in data["unused"]["remarks"]:
        yield "not used", line
    yield "rendering", _rendering(data["rendering"])
    yield "control tokens", f"as text in {data['control_text']['rows']} rows"
    yield "copies", f"{copies['rows']} rows; {copies['same_prompt_other_answer']} more repeat only an earlier prompt"
    yield "leaks", f"{leaks['exact']} validation prompts also in training, {leaks['normalized']} after normalization"
    for kind, found in data["languages"].items():
        yield f"language: {kind}", _counts(found)
    yield "token parity", _parity(data["parity"])


def _token_lines(data: DataFigures) -> Iterable[tuple[str, str]]:
    rows, tokens, lengths = data["rows"], data["tokens"], data["lengths"]
    cut, empty = data["cut"], data["nothing_to_learn"]
    own = data.get("validation")
    validating = "held out" if own is None else "validate"
    yield "rows", f"{rows['all']:,}, of which {rows['train']:,} are trained on and {rows['validation']:,} {validating}"
    if own is not None:
        yield "validation rows", f"{own['rows']:,} of {own['source']}: {_validation(own)}"
    yield "examples", f"{tokens['examples']:,}, one for each assistant turn that is trained"
    yield (
        "tokens",
        f"{tokens['all']:,}, of which {tokens['supervised']:,} ({tokens['supervised_share']:.1%}) are supervised",
    )
    yield "length", f"median {lengths['median']}, 95 % up to {lengths['p95']}, longest {lengths['longest']} tokens"
    yield from _histogram(lengths["histogram"])
    lost = f"{cut['tokens_lost']:,} tokens lost, {cut['supervised_tokens_lost']:,} of them supervised"
    yield f"truncated at {cut['max_length']}", f"{cut['examples']} examples of {cut['rows']} rows: {lost}"
    yield "nothing to learn", f"{empty['examples']} examples, {empty['rows']} whole rows"


def _base_lines(facts: Facts) -> Iterable[tuple[str, str]]:
    if facts.largest_codes is not None:
        yield "base", largest_codes.describe(facts.largest_codes)


def _needs_lines(facts: Facts) -> Iterable[tuple[str, str]]:
    needs, machine = facts.needs, facts.machine
    yield "parameters", f"{needs['parameters']['all']:,}, of which {needs['parameters']['experts']:,} in experts"
    for stage in needs["devices"]:
        yield f"{stage}, each device", _device(facts, stage)
    yield "disk by stage", ", ".join(f"{name} {gigabytes(size)}" for name, size in needs["disk_bytes"].items())
    yield from _control_lines(facts)
    yield "disk", f"{_fits(disk_needed(facts), machine['disk_free_bytes'])} (with the checkpoints of training)"
    yield "host memory", _fits(host_needed(facts), machine["host_free_bytes"])
    largest = max(device_needed(facts, stage) for stage in needs["device_bytes"])
    yield "GPU memory", _fits(largest, machine["gpu_free_bytes"]) if machine["gpus"] else "there is no GPU here"


def _control_lines(facts: Facts) -> Iterable[tuple[str, str]]:
    controls = controls_of(facts)
    if not controls:
        return
    disk = gigabytes(sum(control["disk_bytes"] for control in controls.values()))
    trained = [f"{name} about {gigabytes(size)}" for name in controls if (size := controls[name]["device_bytes"])]
    yield "controls", f"{', '.join(controls)}: {disk} more on disk"
    yield "controls, each device", f"{', '.join(trained) or 'none trains'}"


def _device(facts: Facts, stage: str) -> str:
    """Describe the memory of a stage: the measured peak of each phase, or else the estimate of each part."""
    found, part = facts.needs["devices"][stage], facts.needs["device_bytes"][stage]
    strategy = STRATEGIES[facts.plan.sharding]
    how = f" with sharding={facts.plan.sharding.name} on {facts.machine['processes']} processes"
    _, tokens = as_batched(facts.plan.trainings[stage], facts.needs["tokens"], facts.plan.data.max_length)
    total = f"{gigabytes(found['bytes'])} at {tokens} tokens{how if strategy.sharded else ''}"
    if found["phases"]:
        peaks = ", ".join(f"{phase} {gigabytes(size)}" for phase, size in found["phases"].items())
        return f"{total}, measured with fake tensors: {peaks}"
    names = [name for name, size in part.items() if size and name != "total"]
    shown = ", ".join(f"{name} {gigabytes(part[name])}" for name in names)
    alone = " before sharding" if strategy.sharded else ""
    return f"about {total}, estimated, because {found['estimated_because']}. Parts{alone}: {shown}"


def _fits(needed: int, free: int) -> str:
    verdict = "fits" if needed <= free else "DOES NOT FIT"
    return f"up to {gigabytes(needed)} needed, {gigabytes(free)} free: {verdict}"


def _histogram(counts: dict[str, int]) -> Iterable[tuple[str, str]]:
    most = max(counts.values())
    for edge, count in counts.items():
        bar = "█" * max(round(_BAR * count / most), count > 0)
        yield f"  up to {edge}", f"{bar} {count}"


def _validation(own: ValidationFigures) -> str:
    tokens, cut = own["tokens"], own["cut"]
    return (
        f"{tokens['examples']:,} examples, {tokens['all']:,} tokens ({tokens['supervised_share']:.1%} supervised),"
        f" longest {own['lengths']['longest']}, {cut['examples']} truncated"
    )


def _rendering(found: RenderingFigures) -> str:
    refused = f"; the chat template refuses {found['refused']}" if found["refused"] else ""
    return (
        f"{found['form']}, as in {', '.join(engines_that_render(found['form']))}; {found['differ']} of"
        f" {found['compared']} rows have other tokens with the other rendering{refused}"
    )


def _parity(parity: ParityFigures) -> str:
    if not parity["is_checked"]:
        return f"not checked: {parity['reason']}"
    return f"{parity['examples'] - parity['differ']} of {parity['examples']} examples have openai-harmony's tokens"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) or "none"


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH, highlight=False)
