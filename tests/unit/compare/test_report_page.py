"""The page and its plots contain no scripts, load nothing, escape all text, and have the same bytes each time."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import evaluated
import pytest
from evaluated import RIGHT, WRONG, answer

from pipeline.compare import charts, content, page, plots, runs
from pipeline.compare.charts import Chart, Point, Series
from pipeline.compare.content import Content

ATTACK = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x00\ud800{{ 7 * 7 }}"
HEBREW = "שלום עולם"
VOID = {"meta", "br", "img"}


def report(directory: Path) -> Content:
    answers = {
        "sft": [answer(0, RIGHT, reasoning=HEBREW), answer(1, RIGHT, tool_calls=[{"name": "<b>", "arguments": "{}"}])],
        "qat": [answer(0, ATTACK, messages=[{"role": "user", "content": ATTACK}]), answer(1, WRONG, finish="length")],
    }
    rate = {"exact_match_low": 0.2, "exact_match_high": 0.9, "exact_match_decided": 2.0}
    figures = {
        model: {"validation_loss": loss, "weight_bytes": 100.0, "exact_match": 0.5, "exact_match/de": 0.5, **rate}
        | {f"{name}/de": value for name, value in rate.items()}
        for model, loss in {"sft": 2.0, "qat": 2.1}.items()
    }
    evaluated.run(directory, figures=figures, answers=answers)
    (directory / "qat" / "metrics.jsonl").write_text(
        '{"step": 0, "eval_loss": 2.5, "eval_changed_codes": 0.0}\n{"step": 5, "loss": 2.2}\n'
        '{"step": 10, "eval_loss": 2.1, "eval_changed_codes": 0.1}\n'
    )
    return content.collect(runs.find([str(directory)]), 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, str]:
    found = report(tmp_path_factory.mktemp("report") / "<run>")
    return found, page.render(found, plots.draw(found.charts))


class Tags(HTMLParser):
    """Tags with their attributes. Every opened tag must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_has_no_scripts_and_loads_nothing(made: tuple[Content, str]) -> None:
    tags = Tags(made[1]).seen
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    attributes = [(name, value or "") for _, each in tags for name, value in each.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "action")]
    assert all(value.startswith("#") for name, value in attributes if name.endswith("href"))
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", made[1])
    policies = [each["content"] for tag, each in tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_answers_of_models_are_escaped(made: tuple[Content, str]) -> None:
    text = made[1]
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;\u202e\ufffd\ufffd{{ 7 * 7 }}" in text
    )
    assert "call of &lt;b&gt;" in text
    text.encode("utf-8")  # lone surrogates would raise


def test_text_from_right_to_left_has_its_direction(made: tuple[Content, str]) -> None:
    assert f'<div class="text" dir="auto">{HEBREW}</div>' in made[1]


def test_ids_are_unique_and_references_point_to_them(made: tuple[Content, str]) -> None:
    tags = Tags(made[1]).seen
    ids = [each["id"] for _, each in tags if "id" in each]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", made[1])
    references += [str(each["xlink:href"])[1:] for _, each in tags if "xlink:href" in each]
    assert set(references) <= set(ids)


def test_every_plot_has_a_description_and_a_table_of_its_figures(made: tuple[Content, str]) -> None:
    found, text = made
    assert {chart.kind for chart in found.charts} == {"lines", "dots", "tradeoff"}
    for chart in found.charts:
        figure = text[text.index(f'<figure id="{chart.name}">') :].partition("</figure>")[0]
        assert f"<title>{chart.title}</title><desc>" in figure
        assert figure.count("<tr>") == 1 + sum(len(series.points) for series in chart.series)


def test_plots_take_all_colours_from_the_page(made: tuple[Content, str]) -> None:
    for plot in plots.draw(made[0].charts).values():
        assert not re.findall(r"#[0-9a-f]{6}\b", plot.svg)
        used = set(re.findall(r"var\(--([\w-]+)\)", plot.svg))
        assert all(made[1].count(f"--{name}: #") == 2 for name in used)  # in the light style and in the dark style


def test_the_same_report_gives_the_same_bytes(made: tuple[Content, str]) -> None:
    drawn, again = (plots.draw(made[0].charts) for _ in range(2))
    assert drawn == again and page.render(made[0], drawn) == made[1]
    assert all(plot.png.startswith(b"\x89PNG") for plot in drawn.values())


@pytest.mark.parametrize("name", ["$x_1$ and $", r"\1 <b>&", "a" * 90, "ü,/" * 30])
def test_names_are_drawn_unchanged(name: str) -> None:
    chart = Chart("x", name, name, "dots", "x", "", [Series(name, [Point(name, 0.5, 0.1, 0.9)])], is_share=True)
    root = ElementTree.fromstring(
        plots.draw([chart])["x"].svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    )
    assert next(iter(root)).text == name
    assert name.replace("\n", "") in "".join(root.itertext()).replace("\n", "")


def test_tables_of_plots_use_the_units_of_the_axes() -> None:
    series = [Series("a", [Point(1_500_000, 0.25, 0.2, 0.3)])]
    chart = Chart("x", "", "", "tradeoff", "weights", "rate (%)", series, is_share=True)
    assert charts.tabulate(chart) == (
        ["", "weights", "rate (%)", "95 % interval"],
        [["a", "1.50 MB", "25.00", "20.00 to 30.00"]],
    )


def test_the_loss_of_the_original_does_not_compress_the_plot(tmp_path: Path) -> None:
    losses = {"upcast": 7.0, "sft": 2.0, "qat": 2.1}
    figures = {model: {"validation_loss": loss} for model, loss in losses.items()}
    found = content.collect(runs.find([str(evaluated.run(tmp_path / "run", figures=figures))]), 0).charts[0]
    assert [series.name for series in found.series] == ["SFT", "QAT"]
    assert "Dominated: Original." in found.description
    assert "Outside the plot: Original, 7.000." in found.description


def test_a_diverged_model_is_in_the_table_but_not_in_the_plots(tmp_path: Path) -> None:
    losses = {"sft": 2.0, "quantize": 2.1, "qat": float("nan")}
    figures = {model: {"validation_loss": loss} for model, loss in losses.items()}
    found = content.collect(runs.find([str(evaluated.run(tmp_path / "run", figures=figures))]), 0)
    assert [series.name for series in found.charts[0].series] == ["SFT", "PTQ"]
    assert "nan" in found.tables[0].cells(found.rows)[2]
