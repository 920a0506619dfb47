"""Values of the wrong type and missing values are refused. One message lists all of them."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from config.composing import STAGES, Mistake, found_on, one_line

WRONG_TYPES = {
    "sft.learning_rate=fast": "sft.learning_rate=fast: must be a number.",
    "sft.learning_rate=[1]": "sft.learning_rate=[1]: lists several values, but sft.learning_rate takes one (a number).",
    "sft.max_steps=1.5": "sft.max_steps=1.5: must be a whole number.",
    "sft.method=dora": "sft.method=dora: no such choice. Did you mean 'lora'? Choose from: full, lora, bf16_parts.",
    "sft.batch_size=null": "sft.batch_size=null: must be a whole number.",
    "model.path=null": "model.path=null: must be text.",
    "evaluate.source=[qat,foo]": "evaluate.source=['qat','foo']: lists several values, but evaluate.source takes one"
    " (text or null).",
    "evaluate.prompts.expected=3": "evaluate.prompts.expected=3: must be a mapping of texts to texts.",
    "qat.lora.targets=[attention,router]": "qat.lora.targets=['attention','router']: must be a list of names, as in"
    " qat.lora.targets=[attention]. Choose from: attention, experts.",
    "sft.lora=8": "sft.lora=8: sft.lora is a section. Give its settings, as in sft.lora.rank=<value>.",
    "sft=lora": "sft=lora: sft is a section with settings of its own. Use train@sft=lora.",
    "evaluate=quick": "evaluate=quick: evaluate is a section with settings of its own. Use eval=quick.",
    "sft=3": "sft=3: sft is a section, not a setting. Choose train@sft=<choice> (bf16_parts, full, lora), or give its"
    " settings one by one.",
    "~sft.seed": "~sft.seed: cannot be removed, because every setting has a value. Leave it out, or set it to another"
    " value.",
}


@pytest.mark.parametrize(("argument", "expected"), WRONG_TYPES.items())
def test_a_value_of_the_wrong_type_is_refused(argument: str, expected: str) -> None:
    assert one_line(found_on(argument)) == expected


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("stage=sft,exprot", "stage=exprot: no such choice. Did you mean 'export'?"),
        ("sft.learning_rate=1e-5,fast", "sft.learning_rate=fast: must be a number."),
        ("sft.precision=fp32,fp16", "Choose from: fp32, mixed_bf16, bf16."),
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


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("stage=doctor,sft", "Give one command for each stage, or stage=all for every stage."),
        ("sft.learning_rate=1e-5,2e-5", "Give one value, or add -m for one job for each value."),
        ("sft.seed=range(1,4)", "Give one value, or add -m for one job for each value."),
        ("recipe=smoke,own_data", "Give one value, or add -m for one job for each value."),
        ("qat.lora.targets=attention,experts", "Put the list into brackets: qat.lora.targets=[attention,experts]"),
        ("data.path=a,b", "Put the value into quotes: \"data.path='a,b'\""),
    ],
)
def test_several_values_without_the_sweep_flag_are_refused_with_advice(argument: str, advice: str) -> None:
    assert found_on(argument) == f"{argument}: lists several values, which only a sweep (-m) takes. {advice}"


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
    assert starts == ["sft.lr=1", "qat.lr=1", "data.validation_fraction=few", "recipe=smok"]
