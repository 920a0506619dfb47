"""Collect the content of a report, independent of its layout: decisions, tables, plots, tests, examples."""

from dataclasses import dataclass

from pipeline.compare import about, charts, evidence, examples, exports, exports_table, findings, rows, table
from pipeline.compare.about import About
from pipeline.compare.charts import Chart
from pipeline.compare.decision import state_rule
from pipeline.compare.evidence import Test
from pipeline.compare.examples import Example
from pipeline.compare.exports import Verdict
from pipeline.compare.findings import Finding
from pipeline.compare.rows import Row
from pipeline.compare.runs import EvaluatedRun
from pipeline.compare.table import Table
from pipeline.runs.json_files import Json
from pipeline.runs.records import EvaluateRecord


@dataclass(frozen=True)
class Content:
    """The content of one report.

    Attributes:
        title: heading of the report.
        verdicts: for each export, whether to ship it, and its most important figures.
        rule: the rule of the verdicts, in words.
        about: date, version, settings and hardware.
        reference: name of the reference model for all weight errors, or None.
        rows: one row for each model.
        tables: tables of the models' figures. The first one is the main table.
        tests: paired tests on the models' answers.
        findings: the results in words.
        charts: the plots, as data.
        examples: prompts with the answers of the models side by side.
    """

    title: str
    verdicts: list[Verdict]
    rule: str
    about: About
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
            "verdicts": [
                {"run": each.label, "outcome": each.decision.outcome.name, "headline": each.decision.headline}
                for each in self.verdicts
            ],
            "rule": self.rule,
            "about": {"summary": self.about.summary, **self.about.facts},
            "reference": self.reference,
            "rows": [row.to_json() for row in self.rows],
            "findings": [vars(finding) for finding in self.findings],
            "tests": [test.to_json() for test in self.tests],
        }


def collect(runs: list[EvaluatedRun], most_examples: int, margin: float = 5.0) -> Content:
    """Collect the content of the report on comparable runs.

    Args:
        runs: the runs.
        most_examples: maximum number of examples.
        margin: `compare.margin`, in points.
    """
    found = rows.collect(runs)
    reference = runs[0].evaluated.read(EvaluateRecord).reference
    tests = evidence.run_tests(found)
    return Content(
        title=f"Comparison of {runs[0].label if len(runs) == 1 else f'{len(runs)} runs'}",
        verdicts=exports.judge_exports(runs, found, tests, margin),
        rule=state_rule(margin),
        about=about.describe(runs),
        reference=reference,
        rows=found,
        tables=_tables(runs, found, reference),
        tests=tests,
        findings=findings.describe(found, tests),
        charts=charts.make_charts(runs, found),
        examples=examples.choose(found, most_examples),
    )


def _tables(runs: list[EvaluatedRun], found: list[Row], reference: str | None) -> list[Table]:
    main, *others = table.make_tables(found, reference)
    some = [exports_table.make(runs), table.make_rounding_table(found)]
    return [main, *(each for each in some if each), *others]


def to_markdown(content: Content) -> str:
    """Write the verdicts, the tables and the findings in Markdown."""
    parts = [f"# {content.title}\n\n{content.about.summary}\n"]
    for verdict in content.verdicts:
        heading = f"**{verdict.label + ': ' if verdict.label else ''}{verdict.decision.headline}**\n"
        parts.append(
            heading
            + "".join(f"\n- {tile.title}: {tile.value} ({'; '.join(tile.notes)})" for tile in verdict.tiles)
            + "\n"
        )
    parts.append(f"{content.rule}\n")
    main, *others = content.tables
    parts.append(f"## {main.title}\n\n{table.to_markdown(main, content.rows)}")
    for finding in content.findings:
        parts.append(f"## {finding.title}\n\n" + "".join(f"- {sentence}\n" for sentence in finding.sentences))
    parts += [f"## {each.title}\n\n{table.to_markdown(each, content.rows)}" for each in others]
    return "\n".join(parts)
