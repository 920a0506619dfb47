"""The report as one HTML page that needs nothing else: style and plots are in it, it runs and fetches nothing.

What models wrote is not to be trusted: the template escapes all text, and the page's policy allows only its own style.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.compare import charts, plots
from pipeline.compare.content import Content
from pipeline.compare.evidence import TEST_COLUMNS

_TEMPLATE = "page.html"
# Control characters and lone surrogates, which no HTML file can hold.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def page(report: Content) -> str:
    """The whole page; the same report gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        tables=[(table, table.cells(report.rows)) for table in report.tables],
        test_columns=TEST_COLUMNS,
        tests=[test.cells() for test in report.tests],
        plots=[(chart, Markup(plots.svg(chart)), *charts.figures(chart)) for chart in report.charts],
    )


def _printable(value: Any) -> Any:
    return _NOT_TEXT.sub("\ufffd", value) if type(value) is str else value
