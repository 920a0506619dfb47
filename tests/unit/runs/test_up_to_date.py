"""Stages that are up to date are reported one by one, or together by `stage=all`."""

from pathlib import Path

import pytest

from pipeline.runs import up_to_date


def report(*stages: str) -> None:
    for stage in stages:
        up_to_date.say_if_needed(stage, "the input is new")
        up_to_date.report(stage, Path("r") / stage)


def test_alone_a_stage_is_reported_with_its_directory(capsys: pytest.CaptureFixture[str]) -> None:
    report("sft")
    assert capsys.readouterr().out == "[sft] the input is new\n[sft] up to date: r/sft\n"
    assert not up_to_date.is_summarized("sft")


def test_neighbours_share_one_line_before_the_next_stage_works(capsys: pytest.CaptureFixture[str]) -> None:
    with up_to_date.summarize("all", "r"):
        report("doctor", "upcast")
        up_to_date.say_if_needed("sft", "the input is new")
        assert capsys.readouterr().out == ""
        up_to_date.flush()
        assert capsys.readouterr().out == "[all] up to date: doctor, upcast (r)\n[sft] the input is new\n"
        assert up_to_date.is_summarized("upcast") and not up_to_date.is_summarized("sft")
        report("compare")
    assert capsys.readouterr().out == "[all] up to date: compare (r)\n"


def test_a_stage_of_a_control_is_named_with_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with up_to_date.summarize("all", str(tmp_path)):
        up_to_date.report("sft", tmp_path / "sft")
        up_to_date.report("sft", tmp_path / "controls" / "more_sft" / "sft")
    assert capsys.readouterr().out == f"[all] up to date: sft, controls/more_sft/sft ({tmp_path})\n"


def test_the_line_is_printed_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), up_to_date.summarize("all", "r"):
        report("doctor")
        raise ValueError
    assert capsys.readouterr().out == "[all] up to date: doctor (r)\n"
