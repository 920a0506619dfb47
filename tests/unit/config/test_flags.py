"""Flags may stand anywhere. Unknown flags, and flags with a wrong value, are refused with one message."""

import pytest
from conftest import run_program

from config.composing import Mistake, found_on, one_line
from pipeline.config import PipelineConfig
from pipeline.config.command_line import normalize
from pipeline.config.flags import problems, settings_first


@pytest.mark.parametrize(
    ("arguments", "sorted_arguments"),
    [
        (["stage=sft", "-m", "recipe=smoke"], ["stage=sft", "recipe=smoke", "-m"]),
        (["--config-dir", "D", "stage=sft"], ["stage=sft", "--config-dir", "D"]),
        (
            ["stage=sft", "--cfg", "job", "--info", "recipe=smoke"],
            ["stage=sft", "recipe=smoke", "--cfg", "job", "--info"],
        ),
        (["--info", "all", "--config-dir=a=b", "~data"], ["~data", "--info", "all", "--config-dir=a=b"]),
        (["-cd"], ["-cd"]),
    ],
)
def test_flags_stand_behind_the_settings_with_their_values(arguments: list[str], sorted_arguments: list[str]) -> None:
    assert settings_first(arguments) == sorted_arguments


def test_a_flag_between_settings_runs_the_command(seen: list[PipelineConfig]) -> None:
    assert run_program("stage=sft", "-m", "recipe=smoke", "sft.seed=1,2") == 0
    assert [config.sft.seed for config in seen] == [1, 2]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("--stage=sft", "settings have no dashes. Write stage=sft."),
        ("--train@sft=lora", "settings have no dashes. Write train@sft=lora."),
        ("-stage=sft", "settings have no dashes. Write stage=sft."),
        ("--hlp", "no such flag. Did you mean '--help'?"),
        ("--versoin", "no such flag. Did you mean '--version'?"),
        ("--fast", "no such flag."),
        ("--config=x", "no such flag."),
        ("--cfg=jobb", "no such choice. Choose from: job, hydra, all."),
        ("--config-dir", "needs a value, as in --config-dir <value>."),
    ],
)
def test_a_wrong_flag_is_refused_with_one_message(argument: str, reason: str) -> None:
    assert one_line(found_on(argument)).startswith(f"{argument}: {reason}")


def test_a_wrong_flag_ends_the_command_before_hydra_reads_it(mistake: Mistake) -> None:
    assert mistake("stage=sft", "recipe=smoke", "--fast").startswith("--fast: no such flag.")


def test_every_flag_of_hydra_is_known_in_all_its_forms() -> None:
    from hydra._internal.utils import get_args_parser

    names = [name for action in get_args_parser()._actions for name in action.option_strings]
    assert {"--cfg", "-m"} <= {*names}
    values = {"--cfg": ["job"], "-c": ["job"]}
    others = ("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
    values |= {name: ["x"] for name in (*others, "--experimental-rerun")}
    assert [found for name in names for found in problems([name, *values.get(name, [])])] == []
    assert problems(["--multi", "--config-d", "x"]) == []


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("evaluate.prompts.expected={answer: x}", "++evaluate.prompts.expected={answer: x}"),
        ("+data.roles.human=user", "++data.roles.human=user"),
        ("data.validation.roles.a=user", "++data.validation.roles.a=user"),
        ("+sft.seed=3", "sft.seed=3"),
        ("~sft.seed", "~sft.seed"),
        ("+hydra.job.num=1", "+hydra.job.num=1"),
    ],
)
def test_a_mapping_needs_no_sign_and_a_setting_takes_one(argument: str, read: str) -> None:
    assert normalize([argument]) == [read]


@pytest.mark.parametrize("sign", ["", "+"])
def test_a_mapping_is_set_with_and_without_a_sign(sign: str, seen: list[PipelineConfig]) -> None:
    assert run_program("stage=evaluate", "recipe=smoke", f"{sign}evaluate.prompts.expected={{answer: x}}") == 0
    assert seen[0].evaluate.prompts.expected == {"answer": "x"}
