"""compare: reports what each step of a run gained or lost, for one or several runs.

The report has text, tables, plots and answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.compare import content, page, plots, runs, table
from pipeline.compare.content import Content
from pipeline.compare.evidence import TEST_COLUMNS
from pipeline.compare.names import EXPORT, ORDER
from pipeline.compare.runs import EvaluatedRun
from pipeline.config import PipelineConfig, Stage
from pipeline.runs import up_to_date
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say, warn
from pipeline.runs.exports import is_export
from pipeline.runs.json_files import write_json
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process
from pipeline.runs.records import CompareRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_media, log_metrics, log_report, log_table

_COMPARISONS = "comparisons"
_LONGEST_NAME = 80
_JSON = "compare.json"
_MARKDOWN = "compare.md"
_PAGE = "compare.html"


def run(config: PipelineConfig) -> Artifact:
    """Compare the runs in compare.runs, write the report, and show it.

    If compare.runs is empty, compare the models of this run, and write the report to <run_dir>/compare. A report on
    several runs has a directory of its own, see `place_report`.
    """
    here = Run(config)
    found = _runs(config, here)
    if config.compare.runs:
        here = Run(replace(config, run_dir=place_report(config, found), base_run=None))
    for run in found:
        for model, reason in run.stale_exports.items():
            warn("compare", f"{model}: skipped, because it is stale: {reason}")
    report = content.collect(found, config.compare.examples, config.compare.margin)
    names = [run.directory.as_posix() if config.compare.runs else "evaluate" for run in found]
    artifact = build(
        here,
        Stage.compare,
        settings=("compare",),
        parents={key: value for name, run in zip(names, found, strict=True) for key, value in _parents(name, run)},
        work=lambda directory: _write(report, directory),
        is_report=True,
    )
    if up_to_date.is_summarized(Stage.compare.name):
        up_to_date.flush()
        _show_place(artifact.directory / _PAGE)
    elif is_main_process():
        _show(report, found, artifact.directory / _PAGE)
    return artifact


def _parents(name: str, run: EvaluatedRun) -> Iterator[tuple[str, str]]:
    """Yield the inputs of the report from a run. The report lists exports, also those that were not evaluated."""
    yield name, run.evaluated.fingerprint
    for model, export in run.exports.items():
        yield f"{name}: {model}", export.artifact.fingerprint
        if export.proof is not None:
            yield f"{name}: {Stage.verify.name} of {model}", export.proof.fingerprint


def place_report(config: PipelineConfig, found: list[EvaluatedRun]) -> str:
    """Return the directory in which a report on several runs gets its directory `compare`.

    It is run_dir if the user has set it to a directory that is not a run. Otherwise it is comparisons/<name> beside
    run_dir, so that the report replaces none of a run.
    """
    run_dir = Path(config.run_dir)
    is_set = config.run_dir != f"runs/{config.recipe}"
    is_run = any((run_dir.expanduser() / stage.name).is_dir() for stage in Stage if stage is not Stage.compare)
    if is_set and not is_run and config.compare.name is None:
        return config.run_dir
    name = config.compare.name or _name(found)
    return str(run_dir.parent / _COMPARISONS / name)


def _name(found: list[EvaluatedRun]) -> str:
    """Name a report by the labels of its runs, or by the first label if they are too long for a file name."""
    labels = [run.label.replace("/", "_") for run in found]
    joined = "+".join(labels)
    return joined if len(joined) <= _LONGEST_NAME else f"{labels[0][:_LONGEST_NAME]}+{len(labels) - 1} more"


def _runs(config: PipelineConfig, here: Run) -> list[EvaluatedRun]:
    if config.compare.runs:
        return runs.find(config.compare.runs)
    return runs.find_this(here.require(Stage.evaluate))


def _write(report: Content, directory: Path) -> Result:
    write_json(directory / _JSON, report.to_json())
    (directory / _MARKDOWN).write_text(content.to_markdown(report), encoding="utf-8")
    drawn = plots.draw(report.charts)
    (directory / _PAGE).write_text(page.render(report, drawn), encoding="utf-8")
    images = {chart.name: directory / f"{chart.name}.png" for chart in report.charts}
    tables = {directory / f"{_file_name(each.title)}.jsonl" for each in report.tables}
    written = {*images.values(), *tables, directory / METRICS_FILE}
    for earlier in {*directory.glob("*.png"), *directory.glob("*.jsonl")} - written:
        earlier.unlink()  # an earlier report may have had other plots and tables
    for name, image in images.items():
        image.write_bytes(drawn[name].png)
    for row in report.rows:
        log_metrics(directory, row.to_json(), model=row.name)
    for each in report.tables:
        log_table(directory, _file_name(each.title), each.fields(), each.cells(report.rows))
    log_table(directory, "tests", list(TEST_COLUMNS), [test.cells() for test in report.tests])
    log_media(images, {Stage.compare.name: directory / _PAGE})
    log_report([directory / name for name in (_JSON, _MARKDOWN, _PAGE)] + list(images.values()))
    return Result(Kind.report, CompareRecord(rows=len(report.rows)))


def _file_name(title: str) -> str:
    return title.lower().replace(" ", "_")


def _show(report: Content, found: Sequence[EvaluatedRun], path: Path) -> None:
    for verdict in report.verdicts:
        say("compare", f"{verdict.label + ': ' if verdict.label else ''}{verdict.decision.headline}")
        for tile in verdict.tiles:
            say("compare", f"  {tile.title}: {tile.value} ({'; '.join(tile.notes)})")
    for each in report.tables:
        table.show(each, report.rows)
    for finding in report.findings:
        say("compare", finding.title)
        for sentence in finding.sentences:
            say("compare", f"  {sentence}")
    for sentence in list_not_evaluated([row.model for row in report.rows], found):
        say("compare", sentence)
    _show_place(path)


def list_not_evaluated(models: Sequence[str], found: Sequence[EvaluatedRun]) -> Iterator[str]:
    """Say which kinds of models are not in the report.

    Args:
        models: names of the models in the report.
        found: the runs of the report.
    """
    missing = set(ORDER) - {EXPORT if is_export(model) else model for model in models}
    exports = [export for run in found for export in run.exports.values()]
    if EXPORT in missing and exports and not any(export.is_loadable for export in exports):
        missing.remove(EXPORT)
        targets = " and ".join(sorted({export.target for export in exports}))
        yield f"not evaluated: {EXPORT}, because transformers cannot load {targets}. verify compares its weights"
    if missing:
        names = ", ".join(name for name in ORDER if name in missing)
        yield f"not evaluated: {names} (evaluate.source=all evaluates every stage there is)"


def _show_place(path: Path) -> None:
    say("compare", f"report with plots and answers: {path}")
