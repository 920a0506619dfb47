"""A run records its settings, and a command with run_dir= and without recipe= uses them."""

import shlex
from pathlib import Path

import pytest
import torch  # noqa: F401 - otherwise the program prints that it loads PyTorch
import yaml
from conftest import run_program

from pipeline.config import PipelineConfig, Stage
from pipeline.runs import commands, launches, own_settings
from pipeline.runs.artifacts import Kind, Result
from pipeline.runs.building import build
from pipeline.runs.own_settings import OwnSettings
from pipeline.runs.records import StageRecord
from pipeline.runs.run import Run
from tests.unit.config.composing import replace_stages, write_recipe

SECTIONS = {
    Stage.upcast: ("model.path",),
    Stage.sft: ("data", "sft"),
    Stage.quantize: ("data", "format", "quantize"),
    Stage.qat: ("data", "format", "qat"),
    Stage.export: ("export.source", "format"),
    Stage.evaluate: ("data", "evaluate"),
    Stage.doctor: ("data", "sft", "qat"),
}
"""The settings that each fake stage depends on."""

RUN = "run_dir=r"
MADE = (RUN, "recipe=smoke", "sft.epochs=2")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PipelineConfig]:
    """The configurations that stages were called with. The stages write an empty result. They start in a new place."""
    monkeypatch.chdir(tmp_path)
    found: list[PipelineConfig] = []

    def run(config: PipelineConfig) -> None:
        found.append(config)
        if config.stage in SECTIONS:
            build(
                Run(config),
                config.stage,
                settings=SECTIONS[config.stage],
                parents={},
                work=lambda _: Result(Kind.checkpoint, StageRecord()),
                is_report=config.stage in (Stage.evaluate, Stage.doctor),
            )

    replace_stages(monkeypatch, run)
    return found


def recorded(run_dir: str = "r") -> list[str]:
    own = own_settings.read(Path(run_dir))
    assert own is not None
    return list(own.overrides.values())


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run_program(*arguments) == 2
    return capsys.readouterr().err.rpartition("error: ")[2].rstrip("\n")


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_the_first_stage_records_recipe_groups_and_values(built: list[PipelineConfig], tmp_path: Path) -> None:
    more = ("train@sft=lora", "+data.roles.human=user", "doctor.row=2", "overwrite=true", "hydra.job.num=0")
    assert run_program("stage=sft", *MADE, *more) == 0
    content = yaml.safe_load(Path("r/command.yaml").read_text())
    assert content == {
        "overrides": ["recipe=smoke", "sft.epochs=2", "train@sft=lora", "++data.roles.human=user"],
        "working_directory": str(tmp_path),
        "config_dir": None,
    }


def test_a_later_stage_adds_its_settings_and_the_last_value_counts(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("stage=sft", RUN, "sft.epochs=3", "qat.seed=1") == 0
    assert recorded() == ["recipe=smoke", "sft.epochs=3", "qat.seed=1"]


def test_a_token_is_never_recorded(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE, "evaluate.judge.api_key_env=hf_abcdefghijklmnopqrstuv") == 0
    assert "hf_" not in Path("r/command.yaml").read_text()


def test_a_setting_that_is_not_recorded_is_named_without_its_secret(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=upcast", *MADE, "data.path='https://me:swordfish@host/x.jsonl'") == 0
    message = capsys.readouterr().err
    assert "the run does not record data.path, because the value contains a secret" in message
    assert "swordfish" not in message


@pytest.mark.parametrize(
    "override",
    [
        "+data.filter.topic=[reset_password,change_pin]",
        "tracking.tags=[reset_password,v2]",
        "data.path=/d/eos_token=1/a.jsonl",
        "data.path=abfs://data@account.dfs.core.windows.net/a.jsonl",
        "data.model_identity='Never reveal the password=x'",
    ],
)
def test_an_ordinary_setting_is_recorded_although_it_looks_like_a_secret(override: str) -> None:
    key = override.partition("=")[0].lstrip("+")
    assert own_settings.recordable({key: override}) == {key: override}
    assert own_settings.withheld({key: override}) == []


def test_what_is_refused_is_not_recorded(built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=sft", *MADE) == 0
    message = error_of(capsys, "stage=sft", RUN, "sft.epochs=5")
    assert "sft.epochs: was 2.0, is 5.0" in message
    assert "rebuild it: python -m pipeline stage=sft run_dir=r sft.epochs=5 overwrite=true" in message
    assert recorded() == ["recipe=smoke", "sft.epochs=2"]


@pytest.mark.parametrize("stage", ["evaluate", "export", "upcast", "quantize", "doctor"])
def test_an_experiment_does_not_change_the_settings_of_a_model(stage: str, built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("stage=sft", RUN) == 0
    assert run_program(f"stage={stage}", RUN, "sft.epochs=7", "data.max_samples=30") == 0
    assert recorded() == ["recipe=smoke", "sft.epochs=2"]


def test_a_rebuilt_stage_records_its_new_settings(built: list[PipelineConfig]) -> None:
    for stage in ("sft", "quantize"):
        assert run_program(f"stage={stage}", *MADE) == 0
    assert run_program("stage=sft", RUN, "data.max_samples=30", "overwrite=true") == 0
    assert recorded() == ["recipe=smoke", "sft.epochs=2", "data.max_samples=30"]


def test_a_rebuild_with_the_recipe_forgets_what_the_stage_read_and_keeps_the_rest(built: list[PipelineConfig]) -> None:
    assert run_program("stage=sft", *MADE, "qat.seed=1") == 0
    assert run_program("stage=sft", RUN, "recipe=smoke", "overwrite=true") == 0
    assert recorded() == ["recipe=smoke", "qat.seed=1"]


def test_only_the_main_process_records(built: list[PipelineConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_program("stage=serve", *MADE) == 0
    assert not Path("r/command.yaml").exists()


# --- what is used ----------------------------------------------------------------------------------------------------


def test_a_run_directory_supplies_its_settings_and_one_line_says_so(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=sft", *MADE) == 0
    capsys.readouterr()
    assert run_program("stage=export", RUN) == 0
    assert (built[-1].recipe, built[-1].model.path, built[-1].sft.epochs) == ("smoke", "synthetic://tiny", 2.0)
    assert capsys.readouterr().err == "[run] settings of r: recipe=smoke sft.epochs=2\n"


def test_the_line_names_what_the_command_line_changes_with_both_values(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("stage=sft", RUN, "sft.learning_rate=2e-4", "sft.epochs=2") == 0
    assert built[-1].sft.learning_rate == 2e-4
    assert capsys.readouterr().err.splitlines()[-1] == (
        "[run] settings of r: recipe=smoke sft.epochs=2; the command line changes sft.learning_rate: 0.001 -> 0.0002"
    )


def test_a_recipe_on_the_command_line_counts_alone(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("stage=export", RUN, "recipe=smoke_lora") == 0
    assert (built[-1].recipe, built[-1].sft.epochs) == ("smoke_lora", PipelineConfig().sft.epochs)
    assert "[run]" not in capsys.readouterr().err


def test_a_sweep_uses_them_and_its_jobs_keep_their_names(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("-m", "stage=qat", RUN, "qat.seed=1,2") == 0
    swept = [config for config in built if config.stage is Stage.qat]
    assert [(config.run_dir, config.base_run) for config in swept] == [
        (f"r/sweep/qat.seed={seed}", "r") for seed in (1, 2)
    ]
    assert {config.sft.epochs for config in swept} == {2.0}


def test_a_sweep_over_runs_is_refused_if_it_would_ignore_what_they_have_recorded(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert error_of(capsys, "-m", "stage=sft", "run_dir=new,r", "sft.epochs=2") == (
        "run_dir=new,r: a sweep over run_dir does not take the settings that its runs have recorded, and r has"
        " recorded recipe=smoke. Give these settings, too. Or run one command for each run, which takes them:"
        " python -m pipeline stage=sft run_dir=r sft.epochs=2"
    )
    assert run_program("-m", "stage=sft", "run_dir=new,r", "recipe=smoke", "sft.epochs=2") == 0
    assert [config.recipe for config in built if config.stage is Stage.sft] == ["smoke", "smoke"]


def test_a_sweep_over_runs_of_the_default_recipe_needs_no_recipe(built: list[PipelineConfig]) -> None:
    for stage in ("upcast", "sft"):
        assert run_program("-m", f"stage={stage}", "run_dir=a,b", "model=tiny", "data=arithmetic") == 0
    assert len(built) == 4


def test_a_job_of_a_sweep_knows_itself_and_its_run(built: list[PipelineConfig]) -> None:
    assert run_program("-m", "stage=qat", *MADE, "qat.seed=1,2") == 0
    assert recorded("r/sweep/qat.seed=2") == ["recipe=smoke", "sft.epochs=2", "qat.seed=2", "base_run=r"]
    assert run_program("stage=export", "run_dir='r/sweep/qat.seed=2'") == 0
    assert (built[-1].qat.seed, built[-1].base_run) == (2, "r")


def test_the_composed_configuration_has_them(built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    capsys.readouterr()
    assert run_program("stage=sft", RUN, "--cfg", "job") == 0
    assert "recipe: smoke\n" in (shown := capsys.readouterr().out) and "synthetic://tiny" in shown


def test_a_recipe_of_a_further_directory_is_found_again(built: list[PipelineConfig], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_recipe(tmp_path / "mine", "sft:\n  epochs: 5\n")
    assert run_program("--config-dir", "mine", "stage=upcast", RUN, "recipe=mine") == 0
    assert run_program("stage=export", RUN) == 0
    assert (built[-1].recipe, built[-1].sft.epochs) == ("mine", 5.0)


def test_a_command_that_gives_a_recipe_of_a_further_directory_names_the_directory(
    built: list[PipelineConfig], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    write_recipe(tmp_path / "mine", "")
    assert run_program("--config-dir", "mine", "stage=serve", RUN, "recipe=mine") == 0
    assert needed(built[-1]) == f"python -m pipeline --config-dir {tmp_path}/mine stage=sft recipe=mine run_dir=r"


def test_a_recorded_relative_path_names_the_same_file_from_another_directory(
    built: list[PipelineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chats.jsonl").touch()
    assert run_program("stage=upcast", RUN, "recipe=smoke", "data.path=chats.jsonl", "model.path=openai/gpt") == 0
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    Path("chats.jsonl").write_text("another file")
    Path("validation.jsonl").touch()
    capsys.readouterr()
    assert run_program("stage=export", "run_dir=../r", "data.validation.path=validation.jsonl") == 0
    assert f"data.path={tmp_path}/chats.jsonl model.path=openai/gpt (paths of data.path start at {tmp_path});" in (
        capsys.readouterr().err
    )
    assert built[-1].data.path == f"{tmp_path}/chats.jsonl"
    assert built[-1].model.path == "openai/gpt"
    monkeypatch.chdir(tmp_path)
    assert run_program("stage=export", RUN) == 0
    assert built[-1].data.path == f"{tmp_path}/chats.jsonl"
    assert built[-1].data.validation.path == f"{elsewhere}/validation.jsonl"


def test_a_recorded_relative_path_stays_if_the_run_was_moved_with_its_files(
    built: list[PipelineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    Path("chats.jsonl").touch()
    assert run_program("stage=upcast", RUN, "recipe=smoke", "data.path=chats.jsonl") == 0
    Path.cwd().rename(tmp_path / "second")
    monkeypatch.chdir(tmp_path / "second")
    assert run_program("stage=sft", RUN) == 0
    assert built[-1].data.path == "chats.jsonl"


# --- wrong records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "overrides: []", "overrides: [1]\nworking_directory: /\nconfig_dir: null", "\x00", "overrides: ["],
)
def test_a_damaged_record_is_one_message(
    content: str, built: list[PipelineConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r").mkdir()
    Path("r/command.yaml").write_text(content)
    for arguments in (("stage=upcast", RUN), ("stage=upcast", *MADE)):
        message = error_of(capsys, *arguments)
        assert message.startswith(f"{tmp_path}/r/command.yaml: is not a readable record of the run's settings (")
        assert message.endswith("The next stage then records them again.") and "\n" not in message


def test_a_record_with_wrong_settings_is_one_message_that_names_the_file(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    own_settings.write(Path("r"), OwnSettings({"sft.lr": "sft.lr=1", "recipe": "recipe=smok"}, "/"))
    message = error_of(capsys, "stage=sft", RUN)
    assert message.startswith("2 problems:\n  - r/command.yaml: sft.lr=1: unknown key")
    assert "  - r/command.yaml: recipe=smok: no such choice. Did you mean 'smoke'" in message


def test_a_run_without_a_record_asks_for_its_recipe(
    built: list[PipelineConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=sft", *MADE) == 0
    Path("r/command.yaml").unlink()
    assert error_of(capsys, "stage=export", RUN) == (
        "run_dir=r: was made with recipe=smoke, but has no command.yaml with its settings. Name the recipe, and all"
        f" settings that the run changed (their values are in {tmp_path}/r/sft/config.yaml): python -m pipeline"
        " stage=export run_dir=r recipe=smoke"
    )
    assert run_program("stage=sft", *MADE) == 0
    assert recorded() == ["recipe=smoke", "sft.epochs=2"]


def test_a_new_directory_and_a_run_of_the_default_recipe_need_no_record(built: list[PipelineConfig]) -> None:
    for _ in range(2):
        assert run_program("stage=sft", RUN, "model=tiny", "data=arithmetic") == 0
        Path("r/command.yaml").unlink()


def test_another_spelling_of_a_models_path_does_not_contradict_the_model(
    built: list[PipelineConfig], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").touch()
    assert run_program("stage=sft", *MADE, "data.path=a.jsonl") == 0
    assert run_program("stage=evaluate", RUN, "data.path=other.jsonl") == 0
    assert recorded()[-1] == "data.path=a.jsonl"
    assert run_program("stage=evaluate", RUN, f"data.path={tmp_path}/a.jsonl") == 0
    assert recorded()[-1] == f"data.path={tmp_path}/a.jsonl"


# --- commands in messages --------------------------------------------------------------------------------------------


def needed(config: PipelineConfig) -> str:
    return Run(config).command(Stage.sft)


def test_a_command_is_short_if_the_run_knows_itself_and_whole_if_not(built: list[PipelineConfig]) -> None:
    assert run_program("stage=serve", *MADE, "data.path='my chats.jsonl'") == 0
    whole = """python -m pipeline stage=sft recipe=smoke run_dir=r sft.epochs=2 'data.path='"'"'my chats.jsonl'"'"''"""
    assert needed(built[-1]) == whole
    assert run_program("stage=upcast", *MADE, "data.path='my chats.jsonl'") == 0
    assert needed(built[-1]) == "python -m pipeline stage=sft run_dir=r"
    assert run_program("stage=serve", RUN, "sft.epochs=4") == 0
    assert needed(built[-1]) == "python -m pipeline stage=sft run_dir=r sft.epochs=4"
    assert run_program("stage=serve", RUN, "recipe=smoke") == 0
    assert needed(built[-1]) == "python -m pipeline stage=sft recipe=smoke run_dir=r"


def test_a_stage_of_a_control_is_made_by_controls(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    control = Path("r/controls/more_sft")
    for name in ("sft", "quantize"):
        (control / name).mkdir(parents=True)
    (control / "upcast").symlink_to("../../upcast")
    (control / "control.json").touch()
    made_by = "python -m pipeline stage=controls run_dir=r"
    for stage, named in (("quantize", "more_sft/quantize"), ("sft", "more_sft/sft"), ("controls", "more_sft")):
        command = commands.run_command(Stage[stage], str(control), "overwrite=true")
        assert command == f"{made_by} overwrite={named}"
    assert commands.run_command(Stage.quantize, str(control), "qat.seed=1") == f"{made_by} qat.seed=1"
    command = commands.run_command(Stage.upcast, str(control), "overwrite=true")
    assert command == "python -m pipeline stage=upcast run_dir=r overwrite=true"


def test_no_advice_deletes_a_run_that_only_has_the_place_of_a_control(tmp_path: Path) -> None:
    run_dir = tmp_path / "experiments" / "controls" / "run1"
    (run_dir / "sft").mkdir(parents=True)
    command = commands.run_command(Stage.sft, str(run_dir), "overwrite=true")
    assert command == f"python -m pipeline stage=sft run_dir={run_dir} overwrite=true"


def test_the_export_of_a_target_is_rebuilt_by_a_command_that_names_the_target(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    for path, settings in (("export/gguf", " export.target=gguf"), ("verify/checkpoint", ""), ("export", "")):
        command = commands.rebuild_command(Path("r", path).absolute())
        stage = path.partition("/")[0]
        assert command == f"python -m pipeline stage={stage} run_dir=r{settings} overwrite=true"
    assert commands.rebuild_command(Path("r/data/x").absolute()) is None


def test_a_changed_export_is_rebuilt_from_the_source_that_the_command_names(
    built: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=export", *MADE) == 0
    rebuild = "python -m pipeline stage=export run_dir=r export.source=sft export.target=mxfp4 overwrite=true."
    assert rebuild in error_of(capsys, "stage=export", RUN, "export.source=sft", "export.push_to_hub=a/b")


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("export", ("export.source=sft",)),
        ("export", ("export.source=controls/more_sft/sft",)),
        ("evaluate", ("evaluate.source=qat", "evaluate.endpoint.url=http://h/v1", "evaluate.endpoint.name=a")),
    ],
)
def test_a_damaged_result_is_made_again_from_the_source_it_was_made_from(
    stage: str, given: tuple[str, ...], built: list[PipelineConfig]
) -> None:
    assert run_program(f"stage={stage}", *MADE, "eval=quick", "quantize.source=upcast", *given) == 0
    for other in ((RUN,), (RUN, "recipe=smoke")):  # another command, also one that does not know the run's settings
        assert run_program("stage=serve", *other) == 0
        command = str(commands.rebuild_command(Path("r", stage).absolute()))
        target = ["export.target=mxfp4"] if stage == "export" else []
        assert sorted(shlex.split(command)[3:]) == sorted([f"stage={stage}", RUN, *target, *given, "overwrite=true"])
    assert run_program(f"stage={stage}", RUN, f"{stage}.source=upcast", "overwrite=true") == 0
    assert f"{stage}.source=upcast" in str(commands.rebuild_command(Path("r", stage).absolute()))


def test_a_relative_source_of_a_result_starts_where_its_command_ran(
    built: list[PipelineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my model").mkdir()
    assert run_program("stage=export", *MADE, "export.source='my model'") == 0
    monkeypatch.chdir(Path("r"))
    command = str(commands.rebuild_command(tmp_path / "r" / "export"))
    assert f"export.source={tmp_path}/my model" in shlex.split(command)


def test_the_command_that_goes_on_rebuilds_no_stage_twice(built: list[PipelineConfig]) -> None:
    assert run_program("stage=upcast", *MADE) == 0
    assert run_program("stage=all", RUN, "overwrite=sft,qat", "doctor.row=2") == 0
    assert commands.resume() == "python -m pipeline stage=all run_dir=r doctor.row=2 overwrite=sft,qat"
    commands.mark_begun("sft")
    assert commands.resume() == "python -m pipeline stage=all run_dir=r doctor.row=2 overwrite=qat"
    commands.mark_begun("qat")
    assert commands.resume() == "python -m pipeline stage=all run_dir=r doctor.row=2"


def test_a_sweep_goes_on_with_the_same_command(built: list[PipelineConfig]) -> None:
    assert run_program("-m", "stage=serve", *MADE, "qat.seed=1,2", "overwrite=false") == 0
    assert commands.resume() == "python -m pipeline stage=serve run_dir=r recipe=smoke sft.epochs=2 qat.seed=1,2 -m"


def test_a_sweep_that_rebuilds_goes_on_in_its_launch(
    built: list[PipelineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_OSS_QAT_LAUNCH", "mine")
    monkeypatch.setattr(launches, "_calls", 0)
    assert run_program("-m", "stage=serve", *MADE, "qat.seed=1,2", "overwrite=true") == 0
    assert commands.resume().startswith("GPT_OSS_QAT_LAUNCH=mine python -m pipeline stage=serve ")
    assert commands.resume().endswith(" qat.seed=1,2 overwrite=true -m")


def test_controls_that_have_not_begun_are_still_rebuilt(built: list[PipelineConfig]) -> None:
    assert run_program("stage=controls", "run_dir=r", "recipe=smoke", "controls=true", "overwrite=true") == 0
    assert commands.resume() == (
        f"GPT_OSS_QAT_LAUNCH={launches.present()} python -m pipeline stage=controls recipe=smoke run_dir=r"
        " controls=true overwrite=true"
    )


def test_secrets_are_in_no_message_and_in_no_file(
    built: list[PipelineConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "swordfish-2")
    secret, address = "data.model_identity=${oc.env:TEST_TOKEN}", "data.path='https://me:swordfish-2@host/x.jsonl'"
    assert run_program("stage=upcast", *MADE, secret) == 0
    assert secret in recorded()
    assert run_program("stage=sft", RUN, address, "sft.epochs=3", "serve.extra_arguments=[--api-key,swordfish-2]") == 0
    assert run_program("stage=sft", RUN, "sft.epochs=4", address) == 2
    assert built[-1].data.model_identity == "swordfish-2"
    assert run_program("stage=upcast", "run_dir=m", "recipe=smoke", "model.path='https://me:swordfish-2@host/m'") == 0
    assert "https://***@host/m" in Path("m/upcast/artifact.json").read_text()
    assert run_program("stage=sft", RUN, "model.dtype=${oc.env:TEST_TOKEN}") == 2
    assert run_program("-m", "stage=upcast", RUN, "data.model_identity=${oc.env:TEST_TOKEN}", "sft.seed=1,2") == 0
    output = capsys.readouterr()
    assert "data.path: " in output.err and "Invalid value '***'" in output.err
    assert "swordfish" not in output.out + output.err
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert {"command.yaml", "config.yaml", "artifact.json"} <= {path.name for path in files}
    assert not [path for path in files if b"swordfish" in path.read_bytes()]


def test_the_traceback_of_a_bug_has_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: PipelineConfig) -> None:
        raise RuntimeError(f"no connection to https://me:{'sword'}fish@host")

    monkeypatch.chdir(tmp_path)
    replace_stages(monkeypatch, run)
    assert run_program("stage=upcast", *MADE) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: no connection to https://***@host" in error and "swordfish" not in error
