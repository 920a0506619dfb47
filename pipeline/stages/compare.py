"""compare: what each step won or lost, in one run or several: in words, tables, plots, and answers side by side."""

from pathlib import Path

from pipeline.compare import content, page, plots, runs, table
from pipeline.compare.content import Content
from pipeline.compare.evidence import TEST_COLUMNS
from pipeline.compare.rows import ORDER
from pipeline.compare.runs import EvaluatedRun
from pipeline.config import PipelineConfig, Stage
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact, Kind, Result, write_json
from pipeline.runs.console import say
from pipeline.runs.processes import is_main_process
from pipeline.runs.tracking import log_media, log_metrics, log_report, log_table

_JSON = "compare.json"
_MARKDOWN = "compare.md"
_PAGE = "compare.html"


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/compare of the runs that compare.runs names, else of this one, and show it."""
    found = _runs(config)
    report = content.collect(found, config.compare.examples)
    artifact = artifacts.build(
        config,
        Stage.compare,
        ("compare",),
        {run.directory.as_posix() if config.compare.runs else "evaluate": run.evaluated.fingerprint for run in found},
        lambda directory: _write(report, directory),
        is_report=True,
    )
    if is_main_process():
        _show(report, artifact.directory / _PAGE)
    return artifact


def _runs(config: PipelineConfig) -> list[EvaluatedRun]:
    if config.compare.runs:
        return runs.find(config.compare.runs)
    return runs.find_this(artifacts.require(config, Stage.evaluate))


def _write(report: Content, directory: Path) -> Result:
    write_json(directory / _JSON, report.to_json())
    (directory / _MARKDOWN).write_text(content.to_markdown(report), encoding="utf-8")
    (directory / _PAGE).write_text(page.render(report), encoding="utf-8")
    images = {chart.name: directory / f"{chart.name}.png" for chart in report.charts}
    for earlier in set(directory.glob("*.png")) - set(images.values()):
        earlier.unlink()  # of a report on other figures
    for chart in report.charts:
        plots.write_png(chart, images[chart.name])
    for row in report.rows:
        log_metrics(directory, row.to_json())
    for each in report.tables:
        log_table(directory, each.title.lower().replace(" ", "_"), each.fields(), each.cells(report.rows))
    log_table(directory, "tests", list(TEST_COLUMNS), [test.cells() for test in report.tests])
    log_media(images, {Stage.compare.name: directory / _PAGE})
    log_report(Stage.compare.name, [directory / name for name in (_JSON, _MARKDOWN, _PAGE)] + list(images.values()))
    return Result(Kind.report, details={"rows": len(report.rows)})


def _show(report: Content, path: Path) -> None:
    for each in report.tables:
        table.show(each, report.rows)
    for finding in report.findings:
        say("compare", finding.title)
        for sentence in finding.sentences:
            say("compare", f"  {sentence}")
    missing = [name for name in ORDER if name not in {row.model for row in report.rows}]
    if missing:
        say("compare", f"not evaluated: {', '.join(missing)} (evaluate.source=all evaluates every stage there is)")
    say("compare", f"with plots and answers: {path}")
