"""A wheel has every file of the program. Installed, it works in any directory, also beside a user's pipeline.py."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDING = "raise SystemExit('the file of the user ran')\n"


def run(command: Sequence[str | Path], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(command),
        cwd=directory,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    done = run(command, ROOT, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert done.returncode == 0, done.stderr
    (made,) = directory.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that has the wheel, and this environment's other packages.

    A .pth file lends the packages. Python does not read .pth files in a folder that is lent so, and therefore this
    checkout is not in the environment, even if it is installed as editable.
    """
    environment = tmp_path_factory.mktemp("installed") / "venv"
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", environment],
        [sys.executable, "-m", "pip", "--python", environment, "install", "--quiet", "--no-index", "--no-deps", wheel],
    ):
        done = run(command, environment.parent)
        assert done.returncode == 0, done.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A working directory that has files with names of this program and of a library."""
    (tmp_path / "pipeline.py").write_text(HIDING)
    (tmp_path / "torch.py").write_text(HIDING)
    return tmp_path


def test_a_wheel_has_the_files_of_the_package_the_configuration_and_the_recipes(wheel: Path) -> None:
    files = {
        f"pipeline/{path.relative_to(ROOT)}" for name in ("conf", "recipes") for path in (ROOT / name).rglob("*.yaml")
    }
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    own = {name for name in packed if ".dist-info/" not in name}
    assert own == {name for name in files if "__pycache__" not in name}
    assert {"pipeline/py.typed", "pipeline/compare/page.html", "pipeline/publish/card.md.jinja"} <= own
    assert {name.rpartition("/")[2] for name in packed - own} == {
        "METADATA",
        "WHEEL",
        "entry_points.txt",
        "LICENSE",
        "RECORD",
    }


def test_the_command_runs_in_a_directory_that_has_a_pipeline_py(installed: Path, directory: Path) -> None:
    done = run([installed / "gpt-oss-qat", "stage=upcast", "recipe=smoke"], directory)
    assert done.returncode == 0, done.stderr
    assert (directory / "runs" / "smoke" / "upcast" / "artifact.json").is_file()
    assert f"warning: {directory}/pipeline.py hides this program from `python -m pipeline`" in done.stderr


def test_the_first_screen_names_the_command_that_was_typed(installed: Path, tmp_path: Path) -> None:
    done = run([installed / "gpt-oss-qat"], tmp_path)
    assert done.returncode == 2 and "  gpt-oss-qat stage=all recipe=smoke\n" in done.stderr


def test_the_library_finds_the_configuration_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    """The value is checked after the configuration of the recipe is composed."""
    (tmp_path / "mine.py").write_text(
        "import pipeline\n"
        "print(pipeline.__file__)\n"
        "try:\n"
        '    pipeline.run("upcast", recipe="smoke", overrides=["sft.batch_size=0"])\n'
        "except pipeline.UserError as error:\n"
        "    print(error)\n"
    )
    done = run([installed / "python", "mine.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    file, message = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed.parent) and message.startswith("sft.batch_size=0: must be ")
