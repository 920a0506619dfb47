"""Stages never use an export silently that is stale, unfinished or altered, and read no more proofs than they need."""

import json
import shutil
from pathlib import Path

import pytest
from evaluated import add, record
from exports import EXPORTED, make_export, prove

from pipeline.compare.runs import EvaluatedRun
from pipeline.config import ExportConfig, ExportTarget, ModelConfig, PipelineConfig, Stage
from pipeline.config.targets import TARGETS
from pipeline.errors import UserError
from pipeline.export import EXPORTERS
from pipeline.models import references
from pipeline.runs import artifacts, commands, exports, parts, passing_over
from pipeline.runs.artifacts import EVALUATED_STAGES, Artifact, Kind
from pipeline.runs.run import Run, write_unfinished


def run_of(directory: Path, target: str | None = None, stage: Stage = Stage.serve) -> Run:
    export = ExportConfig(target=None if target is None else ExportTarget[target])
    return Run(PipelineConfig(stage=stage, run_dir=str(directory), export=export, model=ModelConfig("base")))


def make(directory: Path, target: str, model: str = "m") -> Artifact:
    return make_export(
        run_of(directory, target, Stage.export).config, target, EXPORTED, parents={"model": model, "source": "s"}
    )


def begin_export(directory: Path, source: str | None = None) -> None:
    """Leave an export unfinished, as an interruption does."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_unfinished(directory, {"settings": {"export.source": source}, "parents": {}, "data": None})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two exports of one model. gguf was asked for last."""
    record(tmp_path / "run" / "qat", fingerprint="m")
    for target in ("bf16", "gguf"):
        make(tmp_path / "run", target)
    return tmp_path / "run"


def rebuild_qat(run: Path) -> None:
    """Rebuild the model, and export it to gguf anew. The export to bf16 is stale."""
    add(run / "qat", fingerprint="n")
    make(run, "gguf", "n")


def test_an_export_of_a_model_that_was_rebuilt_is_refused_with_the_command_that_rebuilds_it(run: Path) -> None:
    prove(run_of(run, "bf16").config, exports.require(run_of(run, "bf16")))
    rebuild_qat(run)
    assert exports.require(run_of(run)).directory == run / "export" / "gguf"
    with pytest.raises(UserError) as caught:
        exports.require(run_of(run, "bf16"))
    assert str(caught.value) == (
        f"{run}/export/bf16 was made from an earlier qat, which was rebuilt later. Rebuild it: python -m pipeline"
        f" stage=export run_dir={run} export.target=bf16 overwrite=true"
    )


def test_the_command_repeats_the_source_that_the_export_was_made_from(run: Path) -> None:
    rebuild_qat(run)
    add(run / "export" / "bf16", settings={"export.source": "qat"})
    with pytest.raises(UserError, match=r"export\.target=bf16 export\.source=qat overwrite=true"):
        exports.require(run_of(run, "bf16"))


def test_an_export_of_a_stale_model_is_stale(run: Path) -> None:
    record(run / "sft", fingerprint="new")
    add(run / "qat", parents={"sft": "old"})
    with pytest.raises(UserError, match=r"/qat was made from an earlier sft, which was rebuilt later"):
        exports.require(run_of(run, "bf16"))


def test_an_export_from_a_directory_is_stale_if_the_model_there_was_rebuilt(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "sft"
    record(other, fingerprint="n")
    details = json.loads((run / "export" / "bf16" / "artifact.json").read_text())["details"]
    add(run / "export" / "bf16", details={**details, "exported_from": "o/sft", "exported_directory": str(other)})
    with pytest.raises(UserError, match=r"was made from an earlier o/sft, which was rebuilt later"):
        exports.require(run_of(run, "bf16"))
    add(other, fingerprint="m")
    assert exports.require(run_of(run, "bf16")).directory.name == "bf16"


def test_a_removed_model_does_not_make_its_exports_stale(run: Path) -> None:
    shutil.rmtree(run / "qat")
    assert exports.find_stale(run_of(run)) == {}


@pytest.mark.parametrize("name", ["qat", "controls/stochastic/quantize"])
def test_a_new_run_at_the_former_place_of_a_moved_run_makes_no_export_stale(
    run: Path, tmp_path: Path, name: str
) -> None:
    details = json.loads((run / "export" / "bf16" / "artifact.json").read_text())["details"]
    record(tmp_path / "former" / name, fingerprint="another model")
    former = {"exported_from": name, "exported_directory": str(tmp_path / "former" / name)}
    add(run / "export" / "bf16", details={**details, **former})
    shutil.rmtree(run / "qat")
    assert exports.require(run_of(run, "bf16")).directory.name == "bf16"
    record(run / name, fingerprint="rebuilt in this run")
    with pytest.raises(UserError, match=f"was made from an earlier {name}, which was rebuilt later"):
        exports.require(run_of(run, "bf16"))


def test_evaluate_and_compare_leave_stale_exports_out(run: Path) -> None:
    rebuild_qat(run)
    assert [ref.directory.name for ref in references.export_refs(run_of(run))] == ["gguf"]
    assert list(exports.find_stale(run_of(run))) == ["bf16"]
    record(run / "evaluate", kind="report")
    (run / "evaluate" / "config.yaml").write_text("base_run: null\n")
    compared = EvaluatedRun("run", run, artifacts.load(run / "evaluate"))
    assert [export.target for export in compared.exports.values()] == ["gguf"]
    assert list(compared.stale_exports) == ["export/bf16"]


def test_an_unfinished_export_is_not_passed_over(run: Path) -> None:
    (run / "export" / "mxfp4").mkdir()
    (run / "export" / "mxfp4" / "unfinished.json").write_text("{}")
    for act in (
        lambda: exports.require(run_of(run)),
        lambda: references.find(run_of(run, stage=Stage.evaluate), None, EVALUATED_STAGES, "evaluate.source"),
    ):
        with pytest.raises(UserError) as caught:
            act()
        assert str(caught.value).startswith(
            f"{run}/export/mxfp4 is unfinished, so export.target is not clear. Finish export/mxfp4: python -m pipeline"
            f" stage=export run_dir={run} export.target=mxfp4. Or take the complete export: "
        )
    assert exports.require(run_of(run, "gguf")).directory.name == "gguf"
    (found,) = passing_over.find_unfinished(run_of(run), EVALUATED_STAGES)
    assert found.name == "export/mxfp4" and found.command.endswith("export.target=mxfp4")


def test_an_unfinished_export_that_transformers_cannot_load_stops_no_evaluation(run: Path) -> None:
    make(run, "mxfp4")
    begin_export(run / "export" / "gguf")
    here = run_of(run, stage=Stage.evaluate)
    ref = references.find(here, None, EVALUATED_STAGES, "evaluate.source")
    assert ref.directory == run / "export" / "mxfp4"
    assert passing_over.find_unfinished(here, EVALUATED_STAGES, models_only=True) == []
    begin_export(run / "export" / "bf16")
    with pytest.raises(UserError, match=r"bf16 is unfinished, .* take the complete export: .* export\.target=mxfp4"):
        references.find(here, None, EVALUATED_STAGES, "evaluate.source")
    for target, exporter in EXPORTERS.items():
        assert TARGETS[target].is_loadable == (exporter.kind is not Kind.foreign)


def test_the_command_that_finishes_an_export_repeats_its_source(run: Path) -> None:
    begin_export(run / "export" / "mxfp4", source="quantize")
    with pytest.raises(UserError, match=r"Finish export/mxfp4: .* export\.target=mxfp4 export\.source=quantize\. Or"):
        exports.require(run_of(run))
    with pytest.raises(UserError, match=r"Run first: .* export\.target=mxfp4 export\.source=quantize$"):
        run_of(run, "mxfp4").require(Stage.export)


def test_the_choice_stays_if_another_export_is_made_meanwhile(run: Path) -> None:
    chosen = exports.choose(run_of(run))
    make(run, "bf16")
    assert chosen.require(Stage.export).directory.name == "gguf" and chosen.part == "gguf"
    assert chosen.stage_dir(Stage.publish) == run / "publish" / "gguf"


def test_a_changed_file_in_the_place_of_a_link_is_named(run: Path) -> None:
    link = run / "export" / "config.json"
    text = link.read_text()
    link.unlink()
    link.write_text(f"{text} ")
    with pytest.raises(UserError, match=r"export/config\.json: differs from .*export\.target=gguf"):
        exports.require(run_of(run))
    assert parts.resolve(run / "export") == run / "export"
    link.write_text(text)
    assert exports.require(run_of(run)).directory.name == "gguf" and link.is_symlink()


def test_the_path_that_shows_an_export_means_the_export(run: Path, tmp_path: Path) -> None:
    assert parts.resolve(run / "export") == run / "export" / "gguf"
    assert parts.resolve(run / "export" / "bf16") == run / "export" / "bf16"
    assert parts.resolve(run / "qat") == run / "qat"
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert parts.resolve(copy / "export") == copy / "export" / "gguf"
    place = commands.locate(run / "export")
    assert place is not None and place.target == ("export.target=gguf",)
    ref = references.find(run_of(run), str(run / "export"), EVALUATED_STAGES, "evaluate.source")
    assert (ref.name, ref.directory) == ("export", run / "export" / "gguf")


def test_a_damaged_proof_of_another_export_is_not_read(run: Path) -> None:
    proof = prove(run_of(run, "gguf").config, exports.require(run_of(run)))
    record(run / "verify" / "bf16", kind="report", files={"report.json": 7})
    assert exports.find_proof(run_of(run), exports.require(run_of(run))) == proof
    (run / "verify" / "bf16" / "artifact.json").write_text("damaged")
    assert exports.find_proof(run_of(run), exports.require(run_of(run))) == proof
