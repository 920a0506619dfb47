"""Collect the content of a report, independent of its layout: rows, tables, tests, findings, plots and examples."""

from dataclasses import dataclass

from pipeline.compare import charts, evidence, examples, findings, rows, table
from pipeline.compare.charts import Chart
from pipeline.compare.evidence import Test
from pipeline.compare.examples import Example
from pipeline.compare.findings import Finding
from pipeline.compare.rows import Row
from pipeline.compare.runs import EvaluatedRun
from pipeline.compare.table import Table
from pipeline.runs.json_files import Json


@dataclass(frozen=True)
class Content:
    """The content of one report.

    Attributes:
        title: heading of the report.
        facts: properties that all models share: name -> value.
        reference: name of the reference model for all weight errors, or None.
        rows: one row for each model.
        tables: tables of the models' figures.
        tests: paired tests on the models' answers.
        findings: the results in words.
        charts: the plots, as data.
        examples: prompts with the answers of the models side by side.
    """

    title: str
    facts: dict[str, str]
    reference: str | None
    rows: list[Row]
    tables: list[Table]
    tests: list[Test]
    findings: list[Finding]
    charts: list[Chart]
    examples: list[Example]

    def to_json(self) -> dict[str, Json]:
        """Return the content of compare.json."""
        return {
            "reference": self.reference,
            "rows": [row.to_json() for row in self.rows],
            "findings": [vars(finding) for finding in self.findings],
            "tests": [test.to_json() for test in self.tests],
        }


def collect(runs: list[EvaluatedRun], most_examples: int) -> Content:
    """Collect the content of the report on comparable runs, with at most `most_examples` examples."""
    found = rows.collect(runs)
    reference = runs[0].evaluated.details["reference"]
    tests = evidence.run_tests(found)
    return Content(
        title=f"Comparison of {runs[0].label if len(runs) == 1 else f'{len(runs)} runs'}",
        facts=_facts(runs),
        reference=reference,
        rows=found,
        tables=_tables(found, reference),
        tests=tests,
        findings=findings.describe(found, tests),
        charts=charts.make_charts(runs, found),
        examples=examples.choose(found, most_examples),
    )


def _tables(found: list[Row], reference: str | None) -> list[Table]:
    rounding = table.make_rounding_table(found)
    kept = [] if rounding is None else [rounding]
    return [*table.make_tables(found, reference), *kept, table.make_cost_table(found)]


def to_markdown(content: Content) -> str:
    """Write the findings and the tables in Markdown."""
    parts = [f"# {content.title}\n"]
    for finding in content.findings:
        parts.append(f"## {finding.title}\n\n" + "".join(f"- {sentence}\n" for sentence in finding.sentences))
    parts += [f"## {each.title}\n\n{table.to_markdown(each, content.rows)}" for each in content.tables]
    return "\n".join(parts)


def _facts(runs: list[EvaluatedRun]) -> dict[str, str]:
    evaluated = runs[0].evaluated
    base = evaluated.base_model
    return {
        "Base model": base["path"] + (f" at revision {base['revision']}" if base["revision"] else ""),
        "Evaluation data": f"{evaluated.settings.get('data.path')}, fingerprint {evaluated.data}",
        "Runs": "\n".join(str(run.directory) for run in runs),
    }
