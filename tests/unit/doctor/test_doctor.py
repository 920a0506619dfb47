"""doctor's figures, findings and display, on rows that each have one problem."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import (
    DataConfig,
    ModelConfig,
    PipelineConfig,
    QatConfig,
    Sharding,
    Stage,
    TinyConfig,
    TrainConfig,
    ValidationConfig,
)
from pipeline.data.conversations import Conversation
from pipeline.data.harmony import Rendering
from pipeline.data.languages import Languages
from pipeline.data.parsing import parse_conversation
from pipeline.data.template_text import Template, TemplateError
from pipeline.doctor import content, display, findings, leaks, renderings, rows
from pipeline.doctor.facts import Facts
from pipeline.doctor.plan import Plan
from pipeline.doctor.rows import Example, Row
from pipeline.errors import UserError
from pipeline.models import tiny_model
from pipeline.runs.host_memory import training_bytes
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run

MAX_LENGTH = DataConfig().max_length
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "thinking": "2 + 3 = 5", "content": "5"}
CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
ADD = {"name": "add", "description": "Adds two numbers.", "parameters": {"type": "object", "properties": {}}}
TOOL_USE: list[dict[str, Any]] = [
    QUESTION,
    {"role": "assistant", "thinking": "I can add.", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "thinking": "So 5.", "content": "It is 5."},
]


def row(*messages: dict[str, Any], where: str = "data.jsonl: row 1", **more: Any) -> Row:
    return Row(parse_conversation({"messages": list(messages), **more}, where), [])


def asked(text: str, number: int = 1) -> Row:
    return row({"role": "user", "content": text}, ANSWER, where=f"data.jsonl: row {number}")


@pytest.fixture(scope="module")
def how(tmp_path_factory: pytest.TempPathFactory) -> Rendering:
    directory = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_model.create_tiny(directory, TinyConfig())
    return Rendering(AutoTokenizer.from_pretrained(directory), "medium", "2025-08-05", True)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_kept_and_lost_tokens_add_up_to_all(how: Rendering) -> None:
    conversation = row(QUESTION, ANSWER).conversation
    (whole,) = rows.examine([conversation], how, 4096)[0].examples
    limit = whole.tokens - 3
    (cut,) = rows.examine([conversation], how, limit)[0].examples
    assert cut == Example(whole.tokens, whole.supervised, limit, whole.supervised - 3)


def test_figures_count_truncated_tokens() -> None:
    one, two = (
        row(QUESTION, ANSWER, where="a: row 1").conversation,
        row(QUESTION, ANSWER, where="a: row 2").conversation,
    )
    examined = [Row(one, [Example(100, 40, 90, 30)]), Row(two, [Example(80, 20, 80, 20), Example(200, 20, 90, 0)])]
    found = rows.figures(examined, 90)
    assert found["tokens"] == {"examples": 3, "all": 380, "supervised": 80, "supervised_share": 80 / 380}
    assert found["cut"] == {
        "max_length": 90,
        "rows": 2,
        "examples": 2,
        "tokens_lost": 120,
        "supervised_tokens_lost": 30,
        "supervised_share_lost": 30 / 80,
        "first": ["a: row 1", "a: row 2"],
    }
    assert found["nothing_to_learn"] == {"examples": 1, "rows": 0, "first": ["a: row 2"]}


def test_the_histogram_holds_every_example_once() -> None:
    conversation = row(QUESTION, ANSWER).conversation
    lengths = [10, 64, 65, 128, 129, 1000]
    examined = [Row(conversation, [Example(length, 1, length, 1)]) for length in lengths]
    found = rows.figures(examined, 4096)["lengths"]
    assert found["histogram"] == {"64": 2, "128": 2, "256": 1, "512": 0, "1024": 1}
    assert (found["shortest"], found["median"], found["longest"]) == (10, 65, 1000)


def test_rows_that_the_template_refuses_are_reported_together(how: Rendering) -> None:
    orphan = {"role": "tool", "content": "5"}
    call = {"role": "assistant", "tool_calls": [CALL]}
    bad = [Conversation([QUESTION, call, ANSWER, orphan, ANSWER], where=f"data.jsonl: row {i}") for i in (1, 2)]
    with pytest.raises(UserError, match=r"2 rows \(1 and 2\): the chat template refuses it"):
        rows.examine(bad, replace(how, form="template"), 4096)


# --- content ---------------------------------------------------------------------------------------------------------


def test_turns_without_reasoning_are_counted_and_the_first_rows_named(how: Rendering) -> None:
    silent = {"role": "assistant", "content": "5"}
    examined = [row(QUESTION, ANSWER, QUESTION, silent, where="a"), row(QUESTION, ANSWER, where="b")]
    found = content.reasoning(examined, how)
    assert found == {"turns": 3, "turns_without": 1, "rows_without": 0, "first": ["a"]}


def test_turns_of_weight_zero_are_counted_and_need_no_reasoning(how: Rendering) -> None:
    silent = {"role": "assistant", "content": "5", "weight": 0}
    examined = [row(QUESTION, silent, QUESTION, silent, QUESTION, ANSWER), row(QUESTION, ANSWER)]
    assert content.untrained(examined) == {"turns": 2, "rows": 1}
    assert content.reasoning(examined, how)["turns"] == 2
    assert content.reasoning(examined, how)["turns_without"] == 0


def test_the_content_of_a_tool_call_is_its_reasoning_with_the_template_alone(how: Rendering) -> None:
    call = {"role": "assistant", "content": "I can add.", "tool_calls": [CALL]}
    without = [
        content.reasoning([row(QUESTION, call)], replace(how, form=form))["turns_without"]
        for form in ("template", "harmony")
    ]
    assert without == [0, 1]


# --- renderings ------------------------------------------------------------------------------------------------------


def test_rows_that_the_chat_template_writes_otherwise_are_counted_with_their_parts(how: Rendering) -> None:
    instructions = {"role": "system", "content": "Be brief."}
    both = {"role": "assistant", "content": "I look.", "thinking": "I can add.", "tool_calls": [CALL]}
    examined = [
        *(row(QUESTION, ANSWER, where="a"), row(instructions, QUESTION, ANSWER, where="b")),
        *(row(*TOOL_USE, tools=[ADD], where="c"), row(QUESTION, both, where="d")),
    ]
    for form in ("harmony", "template"):
        assert renderings.figures(examined, replace(how, form=form)) == {
            "form": form,
            "compared": 4,
            "differ": 2,
            "refused": 1,
            "parts": {"instructions": 1, "tools": 1, "calls": 1, "results": 1},
            "first": ["b", "c"],
        }


def test_the_template_of_a_fine_tune_is_compared_as_well(how: Rendering) -> None:
    other = copy.deepcopy(how.tokenizer)
    other.chat_template = how.tokenizer.chat_template.replace("Knowledge cutoff: 2024-06", "Knowledge cutoff: never")
    assert renderings.figures([row(QUESTION, ANSWER)], replace(how, tokenizer=other))["differ"] == 1


@pytest.mark.parametrize("form", ["harmony", "template"])
def test_a_template_that_takes_too_long_ends_the_comparison_with_advice_that_helps(
    form: str, how: Rendering, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise TemplateError("a: row 1: the chat template takes longer.", "Use data.rendering=harmony.")

    monkeypatch.setattr(Template, "write_script", refuse)
    assert renderings.figures([row(QUESTION, ANSWER)], replace(how, form=form))["compared"] == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "only 0 rows are compared in both renderings. a: row 1: the chat template takes longer." in printed
    assert ("Use data.rendering=harmony" in printed) == (form == "template")


def test_a_syntax_error_of_the_template_is_one_message_with_its_line(
    how: Rendering, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(how.tokenizer)
    other.chat_template = "{# one #}\n{% if %}"
    conversations = [row(QUESTION, ANSWER, where=f"data.jsonl: row {i}").conversation for i in (1, 2)]
    reason = "chat_template.jinja in model.path: line 2 has a syntax error (Expected an expression"
    with pytest.raises(UserError) as caught:
        rows.examine(conversations, replace(how, tokenizer=other, form="template"), 4096)
    assert str(caught.value).startswith(reason) and str(caught.value).endswith("or use data.rendering=harmony.")
    figures = renderings.figures([Row(conversations[0], [])], replace(how, tokenizer=other))
    assert (figures["compared"], figures["refused"]) == (0, 0)
    assert reason in " ".join(capsys.readouterr().err.split())


def test_tools_are_counted_as_offered_called_and_answered() -> None:
    found = content.tools([row(*TOOL_USE, tools=[ADD]), row(QUESTION, ANSWER, tools=[ADD]), row(QUESTION, ANSWER)])
    assert found == {"rows_that_offer": 2, "rows_that_call": 1, "calls": 1, "results": 1, "by_name": {"add": 1}}


def test_calls_of_functions_that_are_not_offered_are_counted_by_name() -> None:
    sub = {"function": {"name": "sub", "arguments": {}}}
    called = [QUESTION, {"role": "assistant", "tool_calls": [sub]}, {"role": "tool", "content": "5"}, ANSWER]
    examined = [row(*TOOL_USE, tools=[ADD]), row(*called, tools=[ADD], where="b"), row(*TOOL_USE, where="c")]
    assert content.unoffered(examined) == {
        "calls": 2,
        "rows": 2,
        "by_name": {"sub": 1, "add": 1},
        "first": ["b", "c"],
    }


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize("thinking", ["", "I stop."])
def test_trained_answers_without_text_are_counted(text: str, thinking: str) -> None:
    empty = {"role": "assistant", "content": text, "thinking": thinking}
    examined = [
        *(row(*TOOL_USE, tools=[ADD]), row(QUESTION, empty, QUESTION, empty, QUESTION, ANSWER, where="b")),
        row(QUESTION, {**empty, "weight": 0}, QUESTION, ANSWER),
    ]
    assert content.empty_answers(examined) == {"turns": 2, "rows": 1, "first": ["b"]}


def test_rows_that_end_with_a_message_without_answer_are_counted() -> None:
    ends = [[QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION], TOOL_USE[:3], TOOL_USE[:2]]
    examined = [row(*messages, where=str(i)) for i, messages in enumerate(ends)]
    assert content.unanswered(examined) == {"rows": 2, "first": ["1", "2"]}


def test_the_effort_of_a_row_overrides_the_default() -> None:
    found = content.efforts([row(QUESTION, ANSWER, reasoning_effort="high"), row(QUESTION, ANSWER)], "low")
    assert found == {"low": 1, "medium": 0, "high": 1}


@pytest.mark.parametrize("token", ["<|im_end|>", "<think>", "</think>", "[INST]", "<</SYS>>", "<|eot_id|>"])
@pytest.mark.parametrize("key", ["content", "thinking"])
def test_control_tokens_of_other_formats_are_found_in_text(token: str, key: str) -> None:
    found = content.control_text([row(QUESTION, {**ANSWER, key: f"well {token} then"}), row(QUESTION, ANSWER)])
    assert found == {"rows": 1, "rows_by_token": {token: 1}, "first": ["data.jsonl: row 1"]}


def test_control_tokens_are_found_in_the_arguments_of_calls() -> None:
    call = {"function": {"name": "add", "arguments": {"a": "<|im_start|>"}}}
    found = content.control_text([row(QUESTION, {"role": "assistant", "thinking": "hm", "tool_calls": [call]})])
    assert found["rows_by_token"] == {"<|im_start|>": 1}


@pytest.mark.parametrize("text", ["a < b | c > d", "if x <| y then z |> w", "<b>bold</b>", "list[int]", "I think so"])
def test_ordinary_text_has_no_control_tokens(text: str) -> None:
    assert content.control_text([row(QUESTION, {**ANSWER, "content": text})])["rows"] == 0


def test_copies_and_other_answers_to_the_same_prompt_are_counted_apart() -> None:
    other = {**ANSWER, "content": "five"}
    found = content.copies([row(QUESTION, ANSWER), row(QUESTION, ANSWER, where="copy"), row(QUESTION, other)])
    assert found == {"rows": 1, "first": ["copy"], "same_prompt_other_answer": 1}


def test_languages_are_counted_by_kind_of_text(how: Rendering) -> None:
    english = "The train left the station before anyone had noticed."
    german = "Der Zug verließ den Bahnhof, bevor es jemand bemerkt hatte."
    turns = ({"role": "user", "content": english}, {"role": "assistant", "thinking": german, "content": "42"})
    found = content.languages([row(*turns)], Languages(["en", "de"], "doctor.languages"), how)
    assert found == {"prompts": {"en": 1}, "reasoning": {"de": 1}, "answers": {"undecided": 1}}


# --- leaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_out", "exact", "normalized"),
    [
        ("What is 2 + 3?", 1, 1),
        ("what  is\n2 + 3 ?", 0, 1),
        ("What is “2 + 3”", 0, 1),
        ("Ｗhat is 2 + 3?", 0, 1),
        ("What is 2 - 3?", 0, 0),
        ("What is 2 + 3.5?", 0, 0),
        ("What is 23?", 0, 0),
    ],
)
def test_leaks_are_found_word_for_word_and_after_normalization(held_out: str, exact: int, normalized: int) -> None:
    found = leaks.figures([asked("What is 2 + 3?", 1)], [asked(held_out, 2), asked("Something else", 3)])
    assert (found["exact"], found["normalized"], found["share"]) == (exact, normalized, normalized / 2)
    assert found["first"] == ["data.jsonl: row 2 = data.jsonl: row 1"] * normalized


def test_words_that_differ_in_vowel_signs_are_different_prompts() -> None:
    assert leaks.figures([asked("किताब क्या है?")], [asked("कुतुब क्या है?")])["normalized"] == 0


def test_prompts_with_different_instructions_are_different() -> None:
    trained = row({"role": "system", "content": "Answer in French."}, QUESTION, ANSWER)
    held_out = row({"role": "system", "content": "Answer in German."}, QUESTION, ANSWER)
    assert leaks.figures([trained], [held_out])["normalized"] == 0


# --- findings --------------------------------------------------------------------------------------------------------

HEALTHY: dict[str, Any] = {
    "rows": {"all": 400, "train": 360, "validation": 40},
    "tokens": {"examples": 400, "all": 40000, "supervised": 8000, "supervised_share": 0.2},
    "lengths": {"shortest": 50, "median": 90, "p95": 120, "longest": 150, "histogram": {"128": 390, "256": 10}},
    "cut": {
        "max_length": 4096,
        "rows": 0,
        "examples": 0,
        "tokens_lost": 0,
        "supervised_tokens_lost": 0,
        "supervised_share_lost": 0.0,
        "first": [],
    },
    "nothing_to_learn": {"examples": 0, "rows": 0, "first": []},
    "reasoning": {"turns": 400, "turns_without": 0, "rows_without": 0, "first": []},
    "reasoning_effort": {"low": 0, "medium": 400, "high": 0},
    "tools": {"rows_that_offer": 0, "rows_that_call": 0, "calls": 0, "results": 0, "by_name": {}},
    "unoffered": {"calls": 0, "rows": 0, "by_name": {}, "first": []},
    "empty_answers": {"turns": 0, "rows": 0, "first": []},
    "unanswered": {"rows": 0, "first": []},
    "control_text": {"rows": 0, "rows_by_token": {}, "first": []},
    "copies": {"rows": 0, "first": [], "same_prompt_other_answer": 0},
    "leaks": {"exact": 0, "normalized": 0, "share": 0.0, "first": []},
    "languages": {"prompts": {"en": 400}, "reasoning": {"de": 400}, "answers": {"undecided": 400}},
    "parity": {"is_checked": False, "reason": "the package openai-harmony is not installed"},
    "untrained": {"turns": 0, "rows": 0},
    "rendering": {"form": "harmony", "compared": 400, "differ": 0, "refused": 0, "parts": {}, "first": []},
    "unused": {"warnings": [], "remarks": ["rows.jsonl: not part of the conversations, and harmless: id (400 rows)"]},
}
TRAINING = {"weights": 40, "gradients": 10, "optimizer": 20, "activations": 30, "rounded": 0, "total": 100}
DEVICE = {"bytes": 100, "phases": {}, "estimated_because": "the model is small"}
NEEDS: dict[str, Any] = {
    "parameters": {"all": 10, "experts": 8},
    "trained_parameters": {"sft": 10, "qat": 10},
    "devices": {"sft": DEVICE, "qat": DEVICE},
    "device_bytes": {"sft": TRAINING, "qat": TRAINING},
    "disk_bytes": {"upcast": 20, "sft": 40, "quantize": 0, "qat": 40, "export": 5},
    "checkpoint_bytes": {"sft": 180, "qat": 120},
    "tokens": 150,
}
MODEL = {"model_type": "gpt_oss", "num_experts_per_tok": 2, **vars(Shape(2, 64, 64, 4, 4, 2, 16, 512))}
ROOMY = {
    "disk_free_bytes": 10**9,
    "host_free_bytes": 10**9,
    "gpus": 1,
    "gpu_free_bytes": 10**9,
    "processes": 1,
    "local_processes": 1,
}
Found = Callable[..., list[str]]


def plan(train: TrainConfig, sharding: Sharding) -> Plan:
    """Make a plan in which sft and qat have the same training settings."""
    return Plan("model", DataConfig("data.jsonl"), train, QatConfig(**vars(train)), sharding, "mxfp4")


@pytest.fixture
def found(tmp_path: Path) -> Found:
    """Return a function that changes some figures and then lists the findings.

    Changes are `data__section__name=value` or `machine__name=value`.
    """

    def of(
        train: TrainConfig | None = None,
        sharding: Sharding = Sharding.none,
        validation: str | None = None,
        identity: str | None = None,
        **changes: Any,
    ) -> list[str]:
        data, machine = {name: dict(values) for name, values in HEALTHY.items()}, dict(ROOMY)
        for key, value in changes.items():
            place, *path = key.split("__")
            (data[path[0]] if place == "data" else machine)[path[-1]] = value
        sft = train or TrainConfig()
        config = DataConfig("data.jsonl", validation=ValidationConfig(path=validation), model_identity=identity)
        plan = Plan("model", config, sft, QatConfig(**vars(sft)), sharding, "mxfp4")
        run = Run(PipelineConfig(Stage.doctor, run_dir=str(tmp_path), model=ModelConfig("model")))
        report = DoctorRecord(data=data, needs=NEEDS, machine=machine, findings=[])
        return findings.findings(Facts.of(report, machine, plan, MODEL, run))

    return of


def test_healthy_figures_have_no_findings(found: Found) -> None:
    assert found() == []


def test_the_most_serious_finding_comes_first(found: Found) -> None:
    messages = found(
        data__copies__rows=3,
        data__reasoning__turns_without=4,
        data__leaks__normalized=1,
        machine__gpu_free_bytes=99,
    )
    beginnings = ("the run does not fit", "validation rows whose", "assistant turns without", "rows that copy")
    assert [message.startswith(start) for message, start in zip(messages, beginnings, strict=True)] == [True] * 4


def test_too_small_a_gpu_is_reported(found: Found) -> None:
    (message,) = found(machine__gpu_free_bytes=99)
    sft = "sft needs about 0.000100 MB on each GPU, but only 0.000099 MB are free."
    assert message.startswith(f"the run does not fit. {sft} qat needs about 0.000100 MB on each GPU")


def test_without_a_gpu_training_must_fit_into_host_memory(found: Found) -> None:
    (message,) = found(machine__gpus=0, machine__host_free_bytes=99)
    assert "training without a GPU needs about" in message
    assert found(machine__gpus=1, machine__host_free_bytes=99) == []


def test_on_gpus_only_the_main_process_holds_the_weights_in_host_memory(found: Found) -> None:
    assert found(machine__host_free_bytes=40, machine__local_processes=8) == []
    (message,) = found(machine__host_free_bytes=39, machine__local_processes=8)
    assert "loading the whole model (quantize, evaluate, verify) needs about" in message


def test_without_gpus_every_process_of_this_machine_trains_in_host_memory(found: Found) -> None:
    two = {"machine__gpus": 0, "machine__local_processes": 2, "machine__processes": 8}
    needed = 2 * training_bytes(100)
    assert found(**two, machine__host_free_bytes=needed) == []
    (message,) = found(**two, machine__host_free_bytes=needed - 1)
    assert "training without a GPU needs" in message


def test_remaining_stages_and_the_checkpoints_of_one_must_fit_on_disk(found: Found) -> None:
    assert found(machine__disk_free_bytes=105 + 180) == []
    (message,) = found(machine__disk_free_bytes=105 + 179)
    assert "run_dir=<a directory on a disk with" in message


def test_complete_stages_need_no_more_disk_space(found: Found, tmp_path: Path) -> None:
    for stage in ("upcast", "sft"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "artifact.json").touch()
    assert found(machine__disk_free_bytes=45 + 120) == []
    assert len(found(machine__disk_free_bytes=45 + 119)) == 1


def test_a_limit_that_truncates_nothing_is_proposed(found: Found) -> None:
    (message,) = found(data__cut__supervised_tokens_lost=9, data__cut__examples=2, data__cut__first=["a: row 7"])
    assert (
        "data.max_length=4096" in message
        and "a: row 7" in message
        and "data.max_length=192 keeps everything" in message
    )


def test_few_validation_rows_are_reported_with_a_sufficient_fraction(found: Found) -> None:
    (message,) = found(data__rows__validation=8, data__rows__train=72)
    assert message.startswith("rows held out by data.validation_fraction=0.1: 8") and message.endswith(
        "Set data.validation_fraction=0.25."
    )
    (message,) = found(data__rows__validation=2, data__rows__train=18)
    assert message.endswith("Use more rows.")


def test_findings_about_validation_rows_of_ones_own_name_them(found: Found) -> None:
    leaks, few = found(
        validation="own.jsonl", data__rows__validation=8, data__leaks__normalized=2, data__leaks__first=["b: row 1 = a"]
    )
    assert leaks.endswith("measures memorization. Remove them from data.validation, or from the training rows.")
    assert few == "rows of data.validation: 8. With so few, the validation loss is mostly noise. Use more rows."


def test_tokens_that_differ_from_harmonys_are_quoted(found: Found) -> None:
    first = {"where": "a: row 3", "position": 17, "ours": "json", "theirs": "<|constrain|>json"}
    parity = {"is_checked": True, "examples": 400, "differ": 2, "first": first}
    (message,) = found(**{f"data__parity__{key}": value for key, value in parity.items()})
    assert "2 of 400" in message
    assert "The first is a: row 3. Around token 17, it has 'json' instead of '<|constrain|>json'." in message


# --- display ---------------------------------------------------------------------------------------------------------


def shown(how: Rendering, capsys: pytest.CaptureFixture[str]) -> list[str]:
    display.conversation(4, row(QUESTION, ANSWER).conversation, how)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_a_conversation_is_plain_text(how: Rendering, capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = shown(how, capsys)
    assert head.startswith("[doctor] row 4 (data.jsonl: row 1), example 1: ")
    assert "\x1b" not in "".join(lines) and all(line == line.rstrip() and len(line) <= 120 for line in lines)
    titles = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert titles == ["prompt", "supervised"]


def test_the_supervised_tokens_are_shown(how: Rendering, capsys: pytest.CaptureFixture[str]) -> None:
    _, *lines = shown(how, capsys)
    start = next(i for i, line in enumerate(lines) if line.startswith("supervised"))
    text = "".join("".join(lines[start:]).removeprefix("supervised").replace("│", "").split())
    assert text == "<|channel|>analysis<|message|>2+3=5<|end|><|start|>assistant<|channel|>final<|message|>5<|return|>"


def test_a_conversation_that_the_template_refuses_is_named_by_setting_and_row(how: Rendering) -> None:
    call, orphan = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}
    bad = Conversation([QUESTION, call, ANSWER, orphan, ANSWER], where="data.jsonl: row 9")
    with pytest.raises(UserError, match=r"doctor\.row=9: data\.jsonl: row 9: the chat template refuses it"):
        display.conversation(9, bad, replace(how, form="template"))


def test_on_a_terminal_a_conversation_is_in_colour(how: Rendering, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, color_system="standard", width=100, legacy_windows=False)
    monkeypatch.setattr(display, "_console", lambda: terminal)
    display.conversation(1, row(QUESTION, ANSWER).conversation, how)
    assert "\x1b[32m<|channel|>" in out.getvalue()


@pytest.mark.parametrize(("packing", "tokens"), [(False, 150), (True, 2 * MAX_LENGTH)])
def test_the_memory_is_shown_with_the_tokens_that_it_is_for(
    packing: bool, tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory is for the longest example, or for a batch of full rows."""
    report = DoctorRecord(data=HEALTHY, needs=NEEDS, machine=ROOMY, findings=[])
    run = Run(PipelineConfig(Stage.doctor, run_dir=str(tmp_path), model=ModelConfig("model")))
    made = Facts.of(report, ROOMY, plan(TrainConfig(packing=packing, batch_size=2), Sharding.none), MODEL, run)
    display.report(made, [], [])
    assert capsys.readouterr().out.count(f" at {tokens} tokens, estimated") == 2


@pytest.mark.parametrize(
    ("section", "figures", "text"),
    [
        (
            "unoffered",
            {"calls": 3, "rows": 2, "by_name": {"sub": 3}},
            "calls of functions that their row does not offer: 3 in 2 rows (rows.jsonl: row 7, …). Calls by",
        ),
        ("empty_answers", {"turns": 3, "rows": 2}, "trained answers without text: 3 in 2 rows (rows.jsonl: row 7, …)."),
        ("unanswered", {"rows": 2}, "rows whose last message has no answer: 2 (rows.jsonl: row 7, …). This message is"),
    ],
)
def test_rows_that_teach_nothing_good_are_a_finding_with_their_count_and_places(
    section: str, figures: dict[str, Any], text: str, found: Found
) -> None:
    changes = {**figures, "first": ["rows.jsonl: row 7"]}
    (message,) = found(**{f"data__{section}__{key}": value for key, value in changes.items()})
    assert message.startswith(text)


def test_unused_columns_are_findings(found: Found) -> None:
    line = "rows.jsonl: not part of the conversations: mood (3 rows). If the model needs them, see data.columns"
    assert found(data__unused__warnings=[line]) == [line]


def test_rows_that_engines_see_otherwise_are_a_finding_with_the_engines(found: Found) -> None:
    changes = {"differ": 5, "parts": {"calls": 5, "results": 4}, "first": ["rows.jsonl: row 7"]}
    (message,) = found(**{f"data__rendering__{key}": value for key, value in changes.items()})
    assert "other tokens with data.rendering=template: 5 of 400 (rows.jsonl: row 7" in message
    assert "(rows.jsonl: row 7, …). Parts that may differ, with their rows: calls in 5, results in 4." in message
    assert "harmony gives the tokens of openai, vllm (0.17 or newer), sglang (/v1/responses, if there are" in message
    assert "tensorrt_llm (if there are instructions or tools). data.rendering=template gives the tokens of" in message


@pytest.mark.parametrize("parts", [{}, {"calls": 1}])
@pytest.mark.parametrize("differ", [1, 2])
def test_a_finding_about_renderings_has_no_empty_part(found: Found, differ: int, parts: dict[str, int]) -> None:
    changes = {"differ": differ, "parts": parts, "first": ["rows.jsonl: row 7"]}
    (message,) = found(**{f"data__rendering__{key}": value for key, value in changes.items()})
    assert f"(rows.jsonl: row 7{', …' if differ == 2 else ''}). " in message
    assert ("Parts that may differ" in message) == bool(parts)
    assert "; )" not in message and "  " not in message and ": ." not in message


def test_a_first_line_that_chat_apis_do_not_write_is_a_finding_with_the_ways_to_set_it(found: Found) -> None:
    (message,) = found(identity="You are Ada.")
    assert message.startswith("data.model_identity='You are Ada.' is the first line of every trained prompt, but")
    assert "tensorrt_llm (a message with the role system)" in message and "vllm" not in message
