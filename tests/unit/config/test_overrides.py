"""Overrides as text: keys, plain values, quotes and secrets."""

import pytest

from pipeline.__main__ import FOLDERS
from pipeline.config.command_line import problems, quote_lists
from pipeline.config.overrides import (
    assignment,
    belongs_to_run,
    by_key,
    key_of,
    plain_value,
    swept_values,
    touches,
)


@pytest.mark.parametrize(
    ("override", "key"),
    [("sft.epochs=2", "sft.epochs"), ("+data.roles.a=user", "data.roles.a"), ("train@sft=lora", "train@sft")],
)
def test_a_key_has_no_signs(override: str, key: str) -> None:
    assert key_of(override) == key


def test_the_last_override_of_a_key_counts_and_stands_last() -> None:
    assert list(by_key(["a=1", "b=2", "++a=3"]).values()) == ["b=2", "++a=3"]


AWKWARD = ["null", "True", "5", "1e3", ".5", "..", "a ", "é", "a{b", "it\\'s", "end\\", "a\\\\'b\\\\", 'say "x"']
"""Texts that Hydra would read as another value, or not at all, without quotes."""


@pytest.mark.parametrize(
    "text", ["runs/x", "/data/my runs/a", "sweep/format=nvfp4,sft.seed=1", "it's", "a\\b", "~/x", *AWKWARD]
)
def test_an_assignment_gives_back_its_text_and_hydra_reads_it(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = assignment("run_dir", text)
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert plain_value(override) == parsed.value() == text


@pytest.mark.parametrize("override", ["run_dir=a,b", "run_dir=r/${recipe}", "run_dir=[a]"])
def test_lists_sweeps_and_interpolations_are_no_plain_values(override: str) -> None:
    assert plain_value(override) is None


@pytest.mark.parametrize("key", ["stage", "run_dir", "overwrite", "doctor.row", "hydra.job.num", "evaluate.source"])
def test_keys_of_one_command_do_not_belong_to_the_run(key: str) -> None:
    assert not belongs_to_run(key)
    assert belongs_to_run("evaluate.sources") and belongs_to_run("sft.epochs") and belongs_to_run("recipe")


def test_a_group_touches_its_section_and_a_recipe_touches_all() -> None:
    assert touches("train@sft", ["sft.epochs"]) and touches("data", ["data.path"]) and touches("recipe", ["qat.seed"])
    assert touches("sft.lora", ["sft.lora.rank"]) and touches("sft.lora.rank", ["sft"])
    assert not touches("train@sft", ["qat.epochs"]) and not touches("recipe", []) and not touches("data", ["data_x"])


@pytest.mark.parametrize("given", ["overwrite=sft,qat", "overwrite=[sft,qat]", "overwrite=[ sft, qat]"])
def test_a_list_of_stages_is_one_value_and_not_a_sweep(given: str) -> None:
    (quoted,) = quote_lists([given])
    assert problems([quoted], FOLDERS) == []
    assert (plain_value(quoted) or "").replace(" ", "") == "sft,qat"


def test_only_lists_are_quoted() -> None:
    arguments = ["overwrite=true", "overwrite=sft", "sft.seed=1,2", "-m"]
    assert quote_lists(arguments) == arguments


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("run_dir=a,b", ["a", "b"]),
        ("run_dir=choice(a, 'b,c')", ["a", "b,c"]),
        ("run_dir=choice(a)", ["a"]),
        ("run_dir='a,b'", []),
        ("run_dir=a", []),
        ("run_dir=a,r/${recipe}", ["a"]),
    ],
)
def test_the_plain_values_of_a_sweep_are_found(override: str, values: list[str]) -> None:
    assert swept_values(override) == values
