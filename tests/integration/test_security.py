"""SECURITY.md is true: code, pickles and templates of others stay without effect, and each named test exists."""

import json
import pickle
import re
from pathlib import Path

import pytest
from conftest import run_program
from forks import ROOT

from pipeline.config import TinyConfig
from pipeline.models.tiny_model import create_tiny

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SHORT = ("recipe=smoke", "data.max_samples=24")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    create_tiny(tmp_path / "model", TinyConfig())
    return tmp_path / "model"


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def run(model: Path, stage: str, *settings: str) -> int:
    return run_program(f"stage={stage}", *SHORT, *settings, f"model.path={model}", f"run_dir={model.parent}/run")


def test_code_beside_a_model_does_not_run(model: Path) -> None:
    trace = model.parent / "was-here"
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    change_json(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    for stage in ("upcast", "evaluate"):
        assert run(model, stage) == 0
    assert not trace.exists()


class Opens:
    """Unpickling this object makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_a_pickle_of_a_model_is_refused_and_not_read(model: Path, capsys) -> None:
    trace = model.parent / "was-here"
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Opens(trace)))
    assert run(model, "upcast") == 2
    assert "Its weights are in PyTorch's format (pytorch_model.bin)" in capsys.readouterr().err
    assert not trace.exists()


def test_a_template_cannot_reach_python(model: Path, capsys) -> None:
    trace = model.parent / "was-here"
    attack = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ messages.append('{trace}') }}}}"
    (model / "chat_template.jinja").write_text(attack)
    assert run(model, "doctor", "data.rendering=template") in (1, 2)
    assert "unsafe" in capsys.readouterr().err


def test_the_program_reads_no_pickles_of_others() -> None:
    """`doctor` exchanges pickles with its own child processes alone."""
    readers = re.compile(r"pickle\.loads?\(|torch\.load\((?!.*weights_only=True)|trust_remote_code")
    found = [path for path in (ROOT / "pipeline").rglob("*.py") if readers.search(path.read_text(encoding="utf-8"))]
    assert {path.name for path in found} == {"peaks.py", "fake_run.py"}


def test_every_test_and_file_that_the_page_names_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(names) >= 10
    assert not [name for name in names if f"def {name}(" not in tests]
    assert not [name for name in re.findall(r"`((?:pipeline|scripts)/[\w/.]+)`", PAGE) if not (ROOT / name).exists()]
