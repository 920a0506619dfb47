"""What a report holds, whatever it is shown as: rows, tables, tests, findings, plots and examples of some runs."""

from dataclasses import dataclass
from typing import Any

from pipeline.compare import charts, evidence, examples, findings, rows, table
from pipeline.compare.charts import Chart
from pipeline.compare.evidence import Test
from pipeline.compare.examples import Example
from pipeline.compare.findings import Finding
from pipeline.compare.rows import Row
from pipeline.compare.runs import Run
from pipeline.compare.table import Table


@dataclass(frozen=True)
class Content:
    """A whole report.

    Attributes:
        title: of the report.
        facts: what all models have in common: name -> value.
        reference: the model that weight errors are relative to.
        rows: the models.
        tables: of their figures.
        tests: paired, on what they answered.
        findings: in words.
        charts: to be plotted.
        examples: answers side by side.
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

    def plain(self) -> dict[str, Any]:
        """The report as compare.json has it."""
        return {
            "reference": self.reference,
            "rows": [row.plain() for row in self.rows],
            "findings": [vars(finding) for finding in self.findings],
            "tests": [test.plain() for test in self.tests],
        }


def of(runs: list[Run], most_examples: int) -> Content:
    """The report on some runs that can be compared."""
    found = rows.of(runs)
    reference = runs[0].evaluated.details["reference"]
    tested = evidence.tests(found)
    return Content(
        f"Comparison of {runs[0].label if len(runs) == 1 else f'{len(runs)} runs'}",
        _facts(runs),
        reference,
        found,
        [*table.tables(found, reference), table.costs(found)],
        tested,
        findings.findings(found, tested),
        charts.charts(runs, found),
        examples.choose(found, most_examples),
    )


def markdown(content: Content) -> str:
    """Findings and tables in Markdown."""
    parts = [f"# {content.title}\n"]
    for finding in content.findings:
        parts.append(f"## {finding.title}\n\n" + "".join(f"- {sentence}\n" for sentence in finding.sentences))
    parts += [f"## {each.title}\n\n{table.markdown(each, content.rows)}" for each in content.tables]
    return "\n".join(parts)


def _facts(runs: list[Run]) -> dict[str, str]:
    evaluated = runs[0].evaluated
    base = evaluated.base_model
    return {
        "Base model": base["path"] + (f" at revision {base['revision']}" if base["revision"] else ""),
        "Evaluation data": f"{evaluated.settings.get('data.path')}, fingerprint {evaluated.data}",
        "Runs": "\n".join(str(run.directory) for run in runs),
    }
