"""`verify` at the command line: wrong exports, exports without a trained model, and directories without an export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import Break, change, drop, set_at, settings, tensors
from conftest import SHORT, run_program
from mutations import DOWN, GATE_UP, SINKS, swap_nibbles
from run_files import source_of

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.runs.json_files import seal, write_json

break_nibbles = change(f"{GATE_UP}_blocks", swap_nibbles)
flip_one_bit = change(f"{DOWN}_blocks", set_at(7, 3, 1, 5, to=lambda byte: byte ^ 1))
drop_sinks = drop(SINKS)
WRONG = ["swapped nibbles", "one bit flipped", "no sinks", "another rope theta"]


def verify(smoke_run: Path, work: Path, export: Path, *more: str) -> int:
    arguments = ("stage=verify", "recipe=smoke", *SHORT, f"run_dir={work}", f"verify.checkpoint={export}")
    return run_program(*arguments, f"model.path={source_of(smoke_run)}", *more)


def report_of(work: Path) -> dict:
    return json.loads((work / "verify" / "report.json").read_text())


@pytest.fixture
def export(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of the export that tests may break. Its artifact.json still names the trained model."""
    return Path(shutil.copytree(smoke_run / "export" / "mxfp4", tmp_path / "export"))


def test_a_good_copy_passes(smoke_run: Path, tmp_path: Path, export: Path) -> None:
    assert verify(smoke_run, tmp_path / "run", export) == 0


@pytest.mark.parametrize("target", ["openai", "nvfp4", "gguf", "bf16"])
def test_every_target_is_proven_in_the_run_that_exported_it(
    target: str, smoke_run: Path, tmp_path: Path, capsys
) -> None:
    settings = ("recipe=smoke", *SHORT, f"run_dir={tmp_path}", f"model.path={source_of(smoke_run)}")
    exported = run_program("stage=export", *settings, f"export.source={smoke_run / 'qat'}", f"export.target={target}")
    assert (exported, run_program("stage=verify", *settings)) == (0, 0)
    report = report_of(tmp_path)
    assert report["target"] == target
    experts = next(check for check in report["checks"] if check["title"].startswith("experts"))
    assert experts["measured"]["differing_values"] == 0 and experts["measured"]["values"] > 0


def test_the_report_has_the_result_of_an_engine(smoke_run: Path, tmp_path: Path, export: Path) -> None:
    assert verify(smoke_run, tmp_path / "run", export, "verify.engines=[transformers]") == 0
    checks = report_of(tmp_path / "run")["checks"]
    (engine,) = (check for check in checks if check["title"].startswith("transformers"))
    assert engine["status"] == "ok"
    assert engine["measured"]["prompts"] == 4
    assert engine["measured"]["version"].startswith("transformers 5.")


def test_an_engine_detects_a_wrong_configuration_without_the_trained_model(
    smoke_run: Path, tmp_path: Path, export: Path, capsys
) -> None:
    """The expected predictions come from the export's own weights. Only the export's configuration is wrong."""
    forget_the_model(export)
    settings(rope_theta=10)(export, export)
    assert verify(smoke_run, tmp_path / "run", export, "verify.engines=[transformers]") == 1
    assert "predicts other tokens" in capsys.readouterr().out


def test_an_engine_for_another_layout_is_the_users_mistake(
    smoke_run: Path, tmp_path: Path, export: Path, capsys
) -> None:
    assert verify(smoke_run, tmp_path / "run", export, "verify.engines=[llama_cpp]") == 2
    assert "verify.engines=llama_cpp: loads gguf, not mxfp4" in capsys.readouterr().err


def forget_the_model(export: Path) -> None:
    (export / "artifact.json").unlink()


@pytest.mark.parametrize("break_", [break_nibbles, flip_one_bit, drop_sinks, settings(rope_theta=1)], ids=WRONG)
def test_wrong_export_exits_with_1_and_leaves_a_report_but_no_artifact(
    smoke_run: Path, tmp_path: Path, export: Path, break_: Break
) -> None:
    break_(export, source_of(smoke_run))
    assert verify(smoke_run, tmp_path / "run", export) == 1
    assert any(check["problems"] for check in report_of(tmp_path / "run")["checks"])
    assert not (tmp_path / "run" / "verify" / "artifact.json").exists()


def test_without_the_trained_model_the_export_is_compared_with_the_base_model_and_gaps_are_reported(
    smoke_run: Path, tmp_path: Path, export: Path, capsys
) -> None:
    forget_the_model(export)
    assert verify(smoke_run, tmp_path / "run", export) == 0
    out = capsys.readouterr().out
    assert "nothing wrong was found. Not checked:" in out
    assert "but not single wrong values" in out
    report = report_of(tmp_path / "run")
    assert [gap.partition(":")[0] for gap in report["not_checked"]] == [
        "weights and logits against the trained model",
        "engines",
    ]
    (distance,) = (check for check in report["checks"] if check["title"].startswith("distance"))
    stored = {projection.name for projection in expert_projections(Checkpoint(export).shape)}
    assert stored < distance["tensors"].keys()
    assert 0 < distance["tensors"][DOWN]["relative_distance"] < 0.2


def test_without_the_trained_model_a_wrong_order_exits_with_1_and_is_named(
    smoke_run: Path, tmp_path: Path, export: Path, capsys
) -> None:
    forget_the_model(export)
    break_nibbles(export, source_of(smoke_run))
    assert verify(smoke_run, tmp_path / "run", export) == 1
    assert f"{GATE_UP}: 1536 of 1536 rows do not resemble" in (err := capsys.readouterr().err)
    assert "expert 0 resembles the base model's with swapped nibbles" in err


def test_without_the_trained_model_the_fingerprint_shows_a_flipped_bit(tmp_path: Path, smoke_run: Path, capsys) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", ignore=shutil.ignore_patterns("qat"), symlinks=True))
    record = json.loads((run / "export" / "artifact.json").read_text())
    record["details"]["exported_directory"] = str(tmp_path / "gone")
    write_json(run / "export" / "artifact.json", seal({key: record[key] for key in record.keys() - {"checksum"}}))
    (shard,) = (run / "export").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first byte after the header is part of a BF16 value
    shard.write_bytes(content)
    assert verify(smoke_run, tmp_path / "work", run / "export") == 1
    assert f"{shard}: changed since stage=export wrote it: its XXH3-128 was" in capsys.readouterr().err


def test_verify_runs_again_when_the_export_has_changed(tmp_path: Path, smoke_run: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))
    flip_one_bit(run / "export", source_of(smoke_run))
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}") == 1
    assert not (run / "verify" / "artifact.json").exists()


def test_a_moved_run_is_still_proven(tmp_path: Path, smoke_run: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "moved", symlinks=True))
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true") == 0
    assert report_of(run)["trained_model"] == str(run / "qat")


def test_another_run_at_the_former_place_of_a_moved_run_does_not_refute_its_export(
    tmp_path: Path, smoke_run: Path
) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "moved", ignore=shutil.ignore_patterns("qat"), symlinks=True))
    former = shutil.copytree(smoke_run / "sft", tmp_path / "former" / "qat")
    export = (run / "export" / "artifact.json").resolve()
    record = json.loads(export.read_text())
    record["details"]["exported_directory"] = str(former)
    write_json(export, seal({key: record[key] for key in record.keys() - {"checksum"}}))
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true") == 0
    assert report_of(run)["trained_model"] is None


def leave_unfinished(export: Path) -> None:
    (export / "artifact.json").rename(export / "unfinished.json")


def leave_only_adapters(export: Path) -> None:
    shutil.rmtree(export)
    export.mkdir()
    (export / "adapter_config.json").write_text("{}")


def remove_weights(export: Path) -> None:
    forget_the_model(export)
    for path in export.glob("*.safetensors"):
        path.unlink()


def change_architecture(export: Path) -> None:
    forget_the_model(export)
    settings(model_type="llama")(export, export)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (shutil.rmtree, "no such directory"),
        (leave_unfinished, "unfinished"),
        (leave_only_adapters, "holds adapters, not a whole model"),
        (remove_weights, "holds no weights"),
        (change_architecture, "model_type is 'llama'"),
    ],
)
def test_directory_that_is_no_export_is_the_users_mistake(
    smoke_run: Path, tmp_path: Path, export: Path, capsys, make: Callable[[Path], object], said: str
) -> None:
    make(export)
    assert verify(smoke_run, tmp_path / "run", export) == 2
    err = capsys.readouterr().err
    assert f"error: verify.checkpoint={export}: " in err
    assert said in err
    assert not (tmp_path / "run" / "verify").exists()


@pytest.mark.parametrize("stage", ["upcast", "sft", "evaluate"])
def test_result_of_another_stage_is_the_users_mistake(stage: str, smoke_run: Path, tmp_path: Path, capsys) -> None:
    assert verify(smoke_run, tmp_path / "run", smoke_run / stage) == 2
    assert f"a result of stage={stage}, not of stage=export" in capsys.readouterr().err


def make_another_base(smoke_run: Path, directory: Path) -> Path:
    """Make a base model with the same sizes and tokenizer, but with unrelated weights."""
    shutil.copytree(source_of(smoke_run), directory)
    shift = tensors(lambda all_: all_.update({name: tensor.flip(0) for name, tensor in all_.items()}))
    shift(directory, directory)
    return directory


def test_export_of_another_base_model_is_the_users_mistake(smoke_run: Path, tmp_path: Path, capsys) -> None:
    reference = f"verify.reference={make_another_base(smoke_run, tmp_path / 'base')}"
    assert verify(smoke_run, tmp_path / "run", smoke_run / "export", reference) == 2
    assert "was made from the base model synthetic://tiny" in capsys.readouterr().err


def test_without_artifact_weights_of_another_base_model_give_one_message(
    smoke_run: Path, tmp_path: Path, export: Path, capsys
) -> None:
    forget_the_model(export)
    reference = f"verify.reference={make_another_base(smoke_run, tmp_path / 'base')}"
    assert verify(smoke_run, tmp_path / "run", export, reference) == 1
    assert "is not right: 1 problem, " in (err := capsys.readouterr().err)
    assert "the export was made from another base model" in err
