"""compare: one table of what each step won or lost, on the terminal, as Markdown and as JSON."""

import json
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import Artifact, Kind, Result, write_json
from pipeline.config import PipelineConfig, Stage
from pipeline.report import table
from pipeline.tracking import is_main_process, log_metrics, log_report, say

_JSON = "compare.json"
_MARKDOWN = "compare.md"
_ORDER = ("upcast", "sft", "quantize", "qat", "export")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/compare from <run_dir>/evaluate, and show it."""
    evaluated = artifacts.require(config, Stage.evaluate)
    artifact = artifacts.build(
        config,
        Stage.compare,
        (),
        {"evaluate": evaluated.fingerprint},
        lambda directory: _compare(evaluated, directory),
        is_report=True,
    )
    if is_main_process():
        report = json.loads((artifact.directory / _JSON).read_text(encoding="utf-8"))
        table.show(report["rows"], _caption(report))
        missing = [name for name in _ORDER if name not in {row["model"] for row in report["rows"]}]
        if missing:
            say("compare", f"not evaluated: {', '.join(missing)} (evaluate.source=all evaluates every stage there is)")
    return artifact


def _compare(evaluated: Artifact, directory: Path) -> Result:
    results = evaluated.details["results"]
    names = [*(name for name in _ORDER if name in results), *(name for name in results if name not in _ORDER)]
    rows = [_row(name, results) for name in names]
    report = {"reference": evaluated.details["reference"], "rows": rows}
    write_json(directory / _JSON, report)
    (directory / _MARKDOWN).write_text(f"{table.markdown(rows)}\n{_caption(report)}\n", encoding="utf-8")
    for row in rows:
        log_metrics(directory, row)
    log_report(Stage.compare.name, [directory / _JSON, directory / _MARKDOWN])
    return Result(Kind.report, details={"rows": len(rows)})


def _row(name: str, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    figures, sft = results[name], results.get("sft")
    change = figures["validation_loss"] / sft["validation_loss"] - 1 if sft and name not in ("sft", "upcast") else None
    return {"model": name, **figures, "loss_change": change}


def _caption(report: dict[str, Any]) -> str:
    tokens = report["rows"][0]["supervised_tokens"] if report["rows"] else 0
    return (
        f"Loss over {tokens} supervised validation tokens. Relative weight error: of the experts' weights as the"
        f" forward pass uses them, against {report['reference']}."
    )
