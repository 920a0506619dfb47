"""Render the report as one HTML page. The page contains its style and plots, has no scripts, and loads nothing.

The models' answers are untrusted. Therefore the template escapes all text, and the page's Content-Security-Policy
allows only inline styles.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.compare import charts
from pipeline.compare.charts import Chart
from pipeline.compare.content import Content
from pipeline.compare.evidence import TEST_TITLES
from pipeline.compare.plots import Plot

_TEMPLATE = "page.html"
# Control characters, lone surrogates and noncharacters: HTML cannot contain them.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(report: Content, plots: Mapping[str, Plot]) -> str:
    """Render the whole page. The same report always gives the same text.

    Args:
        report: the contents.
        plots: name of each chart -> its plot.
    """
    drawn = {
        group: [_show(chart, plots[chart.name]) for chart in report.charts if chart.group == group]
        for group in charts.GROUPS
    }
    main, *others = [(table, table.cells(report.rows), table.best(report.rows)) for table in report.tables]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_replace_unprintable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        main=main,
        others=others,
        test_titles=TEST_TITLES,
        tests=[test.cells() for test in report.tests],
        plots={group: found for group, found in drawn.items() if found},
        stages=[line.cells() for line in report.about.stages],
    )


def _show(chart: Chart, plot: Plot) -> tuple[Chart, Markup, list[str], list[list[str]]]:
    """Return a chart with its SVG element, and the head and the lines of the table of its figures."""
    return chart, Markup(plot.svg), *charts.tabulate(chart)


def _replace_unprintable(value: object) -> object:
    """Replace characters that HTML cannot contain. Strings of the type Markup are not changed."""
    return _NOT_TEXT.sub("\ufffd", value) if type(value) is str else value
