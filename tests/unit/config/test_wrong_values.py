"""Values of the wrong type and missing values are refused. One message lists all of them."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from config.composing import STAGES, Mistake, found_on, one_line

WRONG_TYPES = {
    "sft.learning_rate=fast": "sft.learning_rate='fast': Value 'fast' of type 'str' could not be converted to Float",
    "sft.max_steps=1.5": "sft.max_steps=1.5: Value '1.5' of type 'float' could not be converted to Integer",
    "sft.method=dora": "sft.method='dora': Invalid value 'dora', expected one of [full, lora, bf16_parts]",
    "sft.batch_size=null": "sft.batch_size=None: field 'sft.batch_size' is not Optional",
    "model.path=null": "model.path=None: field 'model.path' is not Optional",
    "qat.lora.targets=[attention,router]": "qat.lora.targets=['attention', 'router']: Invalid value 'router', expected"
    " one of [attention, experts]",
    "sft=3": "sft=3: Invalid type assigned: int is not a subclass of SftConfig. value: 3",
}


@pytest.mark.parametrize(("argument", "expected"), WRONG_TYPES.items())
def test_a_value_of_the_wrong_type_is_refused(argument: str, expected: str) -> None:
    assert one_line(found_on(argument)) == expected


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("stage=sft,exprot", "'exprot', expected one of [doctor, "),
        ("sft.learning_rate=1e-5,fast", "'fast' of type 'str' could not be converted to Float"),
        ("sft.precision=fp32,fp16", "'fp16', expected one of [fp32, mixed_bf16, bf16]"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_sweep_is_refused_before_it_starts(argument: str, reason: str) -> None:
    assert reason in found_on("-m", argument)


@pytest.mark.parametrize("argument", ["sft.learning_rate=[", "sft={learning_rate:1", "run_dir=a=b"])
def test_a_value_that_cannot_be_parsed_is_refused_with_the_argument(argument: str) -> None:
    assert one_line(found_on(argument)).startswith(f"{argument}: ")


@pytest.mark.parametrize("value", ["runs/my data (1)", "a=b", "a[1]", "it's", "a(b).jsonl", "#1", 'a"b{'])
def test_a_path_that_cannot_be_parsed_is_answered_with_the_quoted_argument(value: str) -> None:
    message = one_line(found_on(f"data.path={value}"))
    _, _, quoted = message.partition("Put the value into quotes: ")
    (word,) = shlex.split(quoted)  # as a shell reads it
    assert OverridesParser.create().parse_override(word).value() == value


def test_several_values_without_the_sweep_flag_are_refused(mistake: Mistake) -> None:
    message = one_line(mistake("stage=sft", "recipe=smoke", "sft.learning_rate=1e-5,2e-5"))
    assert "sft.learning_rate=1e-5,2e-5" in message


def test_a_missing_stage_is_refused_with_all_stages(mistake: Mistake) -> None:
    message = one_line(mistake("recipe=smoke"))
    assert message == f"stage: is not set. Give stage=<value>. Choose one of: {', '.join(STAGES)}."


def test_missing_values_are_reported_together_with_their_full_keys(mistake: Mistake) -> None:
    assert [line.partition(": ")[0] for line in mistake("model.path=???").splitlines()[1:]] == [
        "  - model.path",
        "  - stage",
    ]


def test_several_mistakes_are_reported_together(mistake: Mistake) -> None:
    message = mistake("stage=sft", "sft.lr=1", "qat.lr=1", "data.validation_fraction=few", "recipe=smok")
    first, *others = message.splitlines()
    assert first == "4 problems:"
    starts = [line.removeprefix("  - ").partition(":")[0] for line in others]
    assert starts == ["sft.lr=1", "qat.lr=1", "data.validation_fraction='few'", "recipe=smok"]
