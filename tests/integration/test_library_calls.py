"""`pipeline.run` does what the command does, raises what the command prints, and leaves the process as it was."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_program

import pipeline
from pipeline import Artifact, UserError, run
from pipeline.runs import commands, interruptions
from tests.unit.config.composing import write_recipe


def upcast(run_dir: Path | str, *overrides: str) -> Artifact:
    return run("upcast", recipe="smoke", run_dir=run_dir, overrides=overrides)


def message(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        run(*arguments, **settings)
    assert raised.value.exit_status == 2
    return str(raised.value)


def test_a_stage_leaves_what_the_command_leaves(tmp_path: Path) -> None:
    made = upcast(tmp_path / "library", "model.tiny.seed=5")
    arguments = ("stage=upcast", "recipe=smoke", f"run_dir={tmp_path}/command", "model.tiny.seed=5")
    assert run_program(*arguments) == 0
    by_command = json.loads((tmp_path / "command" / "upcast" / "artifact.json").read_text())
    assert made.fingerprint == by_command["fingerprint"] and made.settings == by_command["settings"]
    configured = [
        yaml.safe_load((tmp_path / name / "upcast" / "config.yaml").read_text()) for name in ("library", "command")
    ]
    assert {key for key in configured[0] if configured[0][key] != configured[1][key]} == {"run_dir"}


def test_a_second_call_is_up_to_date_and_returns_the_same_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = upcast(tmp_path)
    capsys.readouterr()
    assert upcast(tmp_path) == first
    assert "up to date" in capsys.readouterr().out


def test_a_relative_run_dir_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert upcast("here").directory == tmp_path / "here" / "upcast"
    assert run("upcast", recipe="smoke").directory == tmp_path / "runs" / "smoke" / "upcast"


def test_a_run_dir_may_contain_signs_that_have_a_meaning_on_the_command_line(tmp_path: Path) -> None:
    directory = tmp_path / 'it\'s, [a] {"b"}=c\\d #é'
    assert upcast(directory).directory == directory / "upcast"
    assert upcast(f"{tmp_path}/${{recipe}}").directory == tmp_path / "smoke" / "upcast"


def test_a_recipe_of_ones_own_comes_from_config_dir(tmp_path: Path) -> None:
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n"
    )
    made = run("upcast", recipe="mine", run_dir=tmp_path / "run", config_dir=tmp_path / "own")
    assert yaml.safe_load((made.directory / "config.yaml").read_text())["recipe"] == "mine"
    assert "'recipe/mine2'" in message("upcast", recipe="mine2", config_dir=tmp_path / "own")
    assert message("upcast", config_dir=tmp_path / "no") == f"config_dir='{tmp_path}/no': no such directory."


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "stage": ({"stage": "stf"}, "stage=stf: "),
    "recipe": ({"recipe": "smok"}, "recipe=smok: no such choice. Did you mean 'smoke'?"),
    "key": ({"overrides": ["sft.lerning_rate=1"]}, "unknown key 'sft.lerning_rate'. Did you mean 'sft.learning_rate'"),
    "value": ({"overrides": ["sft.max_steps=many"]}, "sft.max_steps=many: "),
    "bound": ({"overrides": ["sft.batch_size=0"]}, "sft.batch_size=0: must be "),
    "sweep": ({"overrides": ["sft.seed=1,2"]}, "sft.seed=1,2: lists several values"),
    "flag": ({"overrides": ["-m"]}, "overrides: '-m' is a flag of the command. "),
    "word": ({"overrides": ["qat"]}, "qat: is not a setting. To run this stage, use stage=qat."),
    "text": ({"overrides": "sft.seed=1"}, "must be a list of settings, as in overrides=['sft.seed=1']."),
    "type": ({"overrides": [1]}, "overrides: 1 is of type int, not a text such as 'sft.max_steps=10'."),
    "twice": ({"overrides": ["stage=qat"]}, "overrides: 'stage=qat' contradicts the argument stage='sft'. Remove one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_that_names_it(mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    assert expected in message(**{"stage": "sft", "recipe": "smoke", **arguments})


def test_several_mistakes_are_one_error_that_lists_them() -> None:
    with pytest.raises(UserError) as raised:
        run("sft", recipe="smoke", overrides=["sft.lr=1", "sft.max_steps=many"])
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["sft.lr=1", "sft.max_steps=many"]


def test_a_missing_stage_is_an_error_with_the_command_that_runs_it(tmp_path: Path) -> None:
    assert "Run first: python -m pipeline stage=upcast recipe=smoke" in message("sft", recipe="smoke", run_dir=tmp_path)


def test_a_run_supplies_its_settings_to_a_call_without_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = upcast(tmp_path, "model.tiny.seed=5")
    capsys.readouterr()
    assert run("upcast", run_dir=tmp_path) == made
    assert capsys.readouterr().err == f"[run] settings of {tmp_path}: recipe=smoke model.tiny.seed=5\n"
    told = message("upcast", run_dir=tmp_path, overrides=["model.tiny.seed=6"])
    assert "model.tiny.seed: was 5, is 6" in told
    assert f"python -m pipeline stage=upcast run_dir={tmp_path} model.tiny.seed=6 overwrite=true." in told
    assert capsys.readouterr().err.endswith("; the command line changes model.tiny.seed: 5 -> 6\n")


def test_calls_and_commands_record_the_same_settings_in_a_run(tmp_path: Path) -> None:
    arguments = ("stage=upcast", "recipe=smoke", "model.tiny.seed=5")
    upcast(tmp_path / "library", "model.tiny.seed=5")
    assert run_program(*arguments, f"run_dir={tmp_path}/command") == 0
    by_call, by_command = (tmp_path / name / "command.yaml" for name in ("library", "command"))
    assert by_call.read_text() == by_command.read_text()
    assert run_program("stage=upcast", f"run_dir={tmp_path}/library") == 0
    run("upcast", run_dir=tmp_path / "command")


def test_a_recipe_from_config_dir_is_found_again(tmp_path: Path) -> None:
    write_recipe(tmp_path, "model:\n  tiny:\n    seed: 5\n")
    made = run("upcast", recipe="mine", run_dir=tmp_path / "run", config_dir=tmp_path)
    assert run("upcast", run_dir=tmp_path / "run") == made


def test_a_call_does_not_see_the_command_of_an_earlier_call(tmp_path: Path) -> None:
    hint = f"Run first: python -m pipeline stage=upcast recipe=smoke run_dir={tmp_path}/new"
    upcast(tmp_path / "old", "model.tiny.seed=5")
    assert commands.current() is None
    assert message("sft", recipe="smoke", run_dir=tmp_path / "new").endswith(hint)
    run("upcast", run_dir=tmp_path / "old")
    assert message("sft", recipe="smoke", run_dir=tmp_path / "new").endswith(hint)
    assert commands.current() is None


def test_an_interrupted_call_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runs.building._work", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("upcast", recipe="smoke", run_dir=tmp_path, overrides=["overwrite=true", "model.tiny.seed=5"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "[upcast] warning: interrupted. stage=upcast: the next run starts from the beginning. To go on:"
        f" python -m pipeline stage=upcast run_dir={tmp_path}"
    )
    assert interruptions.message("interrupted") == ("interrupted. To go on: the same command, without overwrite=true")


def test_a_program_that_uses_hydra_itself_keeps_its_state(tmp_path: Path) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import getbase

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("answer: 42\n")
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.2"):
        mine, version = GlobalHydra.instance().hydra, getbase()
        upcast(tmp_path / "run")
        message("sft", recipe="smoke", overrides=["sft.seed=1,2"])
        assert GlobalHydra.instance().hydra is mine and getbase() == version
        assert hydra.compose("mine") == {"answer": 42}


def test_threads_run_stages_one_after_another(tmp_path: Path) -> None:
    found: dict[int, Artifact] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: upcast(tmp_path / str(i), f"model.tiny.seed={i}")}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: artifact.directory.parent.name for i, artifact in found.items()} == {0: "0", 1: "1"}
    assert found[0].fingerprint != found[1].fingerprint


def test_a_stage_runs_where_an_event_loop_runs_as_in_a_notebook(tmp_path: Path) -> None:
    async def cell() -> Artifact:
        return upcast(tmp_path)

    assert asyncio.run(cell()).stage == "upcast"


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    assert {*pipeline.__all__} <= {*dir(pipeline)}
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__ if name != "FORMATS")
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'rum'"):
        pipeline.rum  # type: ignore[attr-defined]  # noqa: B018
