"""A model that has begun and is unfinished is never passed over silently."""

import json
from pathlib import Path

import pytest
from evaluated import record

from pipeline.config import ExportConfig, PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.models import references
from pipeline.runs import passing_over
from pipeline.runs.artifacts import EVALUATED_STAGES, MODEL_STAGES, load
from pipeline.runs.run import Run

FACTS = {"dtype": "bfloat16"}
EXPORT = {
    "target": "mxfp4",
    "tensor_bytes": 0,
    "expert_weights": 0,
    "copied_tensors": 0,
    "encoded_tensors": 0,
    "copied_experts": 0,
    "other_than_trained": 0,
    "relative_squared_error": 0.0,
    "snr_db": None,
    "moved_weights": 0.0,
    "changed_codes": 0.0,
    "changed_scales": 0.0,
    "survival": 0.0,
    "saturated_blocks": 0.0,
    "account": {},
    "copied": [],
    "exported_from": "quantize",
    "exported_directory": "",
}


def unfinished(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "unfinished.json").write_text(json.dumps({"settings": {}, "parents": {}, "data": None}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose qat was interrupted."""
    for name in ("upcast", "sft", "quantize"):
        record(tmp_path / name, details=FACTS)
    unfinished(tmp_path / "qat")
    return tmp_path


def run(run_dir: Path, stage: Stage, **facts: object) -> Run:
    return Run(PipelineConfig(stage=stage, run_dir=str(run_dir), recipe="smoke", **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "key", "among"),
    [(Stage.export, "export.source", MODEL_STAGES), (Stage.evaluate, "evaluate.source", EVALUATED_STAGES)],
)
def test_an_unfinished_qat_is_refused_with_the_two_ways_on(
    stage: Stage, key: str, among: tuple[Stage, ...], run_dir: Path
) -> None:
    with pytest.raises(UserError) as caught:
        references.find(run(run_dir, stage), None, among, key)
    command = f"python -m pipeline stage={{}} recipe=smoke run_dir={run_dir}"
    assert str(caught.value) == (
        f"{run_dir}/qat is unfinished, so {key} is not clear. Finish qat: {command.format('qat')}. Or take the newest"
        f" complete model: {command.format(stage.name)} {key}=quantize"
    )
    assert references.find(run(run_dir, stage), "quantize", among, key).name == "quantize"


def test_an_unfinished_sft_is_not_passed_over_either(tmp_path: Path) -> None:
    record(tmp_path / "upcast", details=FACTS)
    unfinished(tmp_path / "sft")
    with pytest.raises(UserError, match=r"sft is unfinished, so export\.source is not clear"):
        references.find(run(tmp_path, Stage.export), None, MODEL_STAGES, "export.source")


def test_a_qat_that_has_not_begun_is_no_obstacle(run_dir: Path) -> None:
    (run_dir / "qat" / "unfinished.json").unlink()
    assert references.find(run(run_dir, Stage.export), None, MODEL_STAGES, "export.source").name == "quantize"


def test_an_export_of_quantize_is_not_served_silently_once_qat_has_begun(run_dir: Path) -> None:
    record(run_dir / "export", details=EXPORT, settings={"export.source": None})
    export = load(run_dir / "export")
    with pytest.raises(
        UserError, match=r"was made from quantize, but qat has begun since .* stage=serve .*source=quant"
    ):
        passing_over.raise_if_export_is_older(run(run_dir, Stage.serve), export)
    passing_over.raise_if_export_is_older(run(run_dir, Stage.serve, export=ExportConfig(source="quantize")), export)
    record(run_dir / "export", details=EXPORT, settings={"export.source": "quantize"})
    passing_over.raise_if_export_is_older(run(run_dir, Stage.serve), load(run_dir / "export"))


@pytest.mark.parametrize("named", [None, "qat"])
def test_an_export_of_a_qat_that_is_being_rebuilt_is_neither_served_nor_evaluated_silently(
    named: str | None, run_dir: Path
) -> None:
    record(
        run_dir / "export",
        details={**EXPORT, "exported_from": "qat"},
        settings={"export.source": named},
        parents={"model": "qat"},
    )
    export = load(run_dir / "export")
    for stage, as_it_is in ((Stage.serve, "export.source=qat"), (Stage.publish, "export.source=qat")):
        with pytest.raises(UserError) as caught:
            passing_over.raise_if_export_is_older(run(run_dir, stage), export)
        message = str(caught.value)
        assert "was made from an earlier qat, which is being rebuilt and is unfinished. Finish qat: " in message
        assert message.endswith(f"stage={stage.name} recipe=smoke run_dir={run_dir} {as_it_is}")
    evaluate = run(run_dir, Stage.evaluate)
    with pytest.raises(UserError, match=r"an earlier qat, which is being rebuilt .* evaluate\.source=export$"):
        references.find(evaluate, None, EVALUATED_STAGES, "evaluate.source")
    assert references.find(evaluate, "export", EVALUATED_STAGES, "evaluate.source").name == "export"
    record(run_dir / "qat", details=FACTS)
    assert references.find(evaluate, None, EVALUATED_STAGES, "evaluate.source").name == "export"


def test_an_export_of_quantize_is_not_evaluated_silently_once_qat_has_begun(run_dir: Path) -> None:
    record(run_dir / "export", details=EXPORT, settings={"export.source": None}, parents={"model": "quantize"})
    with pytest.raises(UserError, match=r"was made from quantize, but qat has begun since"):
        references.find(run(run_dir, Stage.evaluate), None, EVALUATED_STAGES, "evaluate.source")
