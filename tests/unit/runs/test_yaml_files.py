"""YAML that the program writes reads as the same values, for each reader that a user may have."""

import math

import pytest
import yaml
from omegaconf import OmegaConf

from pipeline.config import PipelineConfig
from pipeline.config.composition import RECIPES_DIR, compose
from pipeline.runs.settings import plain
from pipeline.runs.yaml_files import as_yaml, read_yaml, value_at

TEXTS = (
    *(
        "",
        " ",
        "text",
        "1",
        "1.5",
        "1e3",
        "-1E-5",
        "1.e+3",
        ".5",
        ".5e3",
        "+7",
        "0x1f",
        "0o17",
        "1_000",
        "12:30:45",
        ".inf",
        ".nan",
    ),
    *(
        "true",
        "yes",
        "off",
        "n",
        "null",
        "~",
        "2026-01-31",
        "a: b",
        "# no comment",
        "- item",
        "[1]",
        "{a: b}",
        "*a",
        "&a",
    ),
    *(
        "'",
        '"',
        "two\nlines\n",
        "tab\there",
        "\x07",
        "é",
        "中文",
        "\u2028",
        "😀",
        "x" * 300,
        "word " * 100,
        "%",
        "@",
        "`",
    ),
)


@pytest.fixture(params=["libyaml", "python"])
def either_implementation(request, monkeypatch):
    from pipeline.runs import yaml_files

    monkeypatch.setattr(yaml, "__with_libyaml__", request.param == "libyaml")
    yaml_files._dumper.cache_clear()
    yield
    yaml_files._dumper.cache_clear()


@pytest.mark.usefixtures("either_implementation")
def test_texts_stay_texts_for_yaml_1_1_and_omegaconf(tmp_path):
    content = {"texts": list(TEXTS), "by text": dict.fromkeys(TEXTS, 1)}
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(content), encoding="utf-8")
    assert read_yaml(path) == content
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == content
    assert OmegaConf.to_container(OmegaConf.load(path)) == content


@pytest.mark.usefixtures("either_implementation")
def test_numbers_and_empty_values_keep_their_types(tmp_path):
    content = [
        0,
        -1,
        10**30,
        0.1,
        1e-5,
        1e22,
        5e-324,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        [],
        {},
        [[{"a": [None]}]],
    ]
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(content), encoding="utf-8")
    for found in (read_yaml(path), OmegaConf.to_container(OmegaConf.load(path))):
        assert found == content
        assert [type(value) for value in found] == [type(value) for value in content]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_settings_of_recipes_have_omegaconfs_bytes(recipe):
    settings = plain(compose(["stage=sft", f"recipe={recipe}"]))
    assert as_yaml(settings) == OmegaConf.to_yaml(OmegaConf.create(settings))


@pytest.mark.usefixtures("either_implementation")
@pytest.mark.parametrize(
    "content", [b"a: [1", b"a: b: c", b"[" * 600, b"\xff\xfe\xff", b"\x00", b"!!python/object:os.system {}", b"*a"]
)
def test_a_file_that_is_no_yaml_is_an_error_of_one_line(content, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        read_yaml(path)


def test_a_value_is_found_by_its_dotted_key():
    content = {"a": {"b": {"c": 0}}, "list": [1]}
    assert value_at(content, "a.b") == {"c": 0}
    assert value_at(content, "a.b.c") == 0
    assert [value_at(content, key) for key in ("a.x", "a.b.c.d", "list.0", "x.y")] == [None] * 4
    assert value_at(None, "a") is value_at(PipelineConfig(), "model") is None
