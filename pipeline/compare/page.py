"""Render the report as one HTML page. The page contains its style and plots, has no scripts, and loads nothing.

The models' answers are untrusted. Therefore the template escapes all text, and the page's Content-Security-Policy
allows only inline styles.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.compare import charts, plots
from pipeline.compare.content import Content
from pipeline.compare.evidence import TEST_TITLES

_TEMPLATE = "page.html"
# Control characters, lone surrogates and noncharacters: HTML cannot contain them.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(report: Content) -> str:
    """Render the whole page. The same report always gives the same text."""
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
        tables=[(table, table.cells(report.rows)) for table in report.tables],
        test_titles=TEST_TITLES,
        tests=[test.cells() for test in report.tests],
        plots=[(chart, Markup(plots.draw_svg(chart)), *charts.tabulate(chart)) for chart in report.charts],
    )


def _replace_unprintable(value: object) -> object:
    """Replace characters that HTML cannot contain. Strings of the type Markup are not changed."""
    return _NOT_TEXT.sub("\ufffd", value) if type(value) is str else value
