"""Commands that tests run in forks behave as in a new interpreter."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

SCRIPT = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["MINE"], __name__, sys.path[0], "torch" in sys.modules, sys.stdin.read())
sys.exit(int(sys.argv[1]))
"""
WAITS = """
import os, sys, time
from pathlib import Path
if os.environ.get("RANK") == "1":
    sys.exit("the process of rank 1 fails")
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(300)
"""


def run(python: list[str], script: Path, directory: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", 'exec "$@"', "bash", *python, script, "7", "two words"],
        cwd=directory,
        env={**os.environ, "PS1": "$ ", "MINE": "x", **environment},
        input="typed",
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "scripts" / "script.py"
    path.parent.mkdir()
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_a_fork_has_all_that_a_new_interpreter_has_and_the_libraries(script: Path, tmp_path: Path) -> None:
    status, printed = run([sys.executable], script, tmp_path)
    assert run(forks.interpreter(), script, tmp_path) == (status, printed.replace("False", "True"))
    assert status == 7 and printed.endswith("False typed\n")


def test_a_variable_that_libraries_read_at_import_needs_a_new_interpreter(script: Path, tmp_path: Path) -> None:
    assert run(forks.interpreter(), script, tmp_path, HF_HOME=str(tmp_path))[1].endswith("False typed\n")


def test_variables_that_libraries_set_in_the_tests_process_need_none(script: Path, tmp_path: Path) -> None:
    """lm_eval sets the first variable, and torch the second."""
    more = {"HF_XET_HIGH_PERFORMANCE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert run(forks.interpreter(), script, tmp_path, **more)[1].endswith("True typed\n")


def test_a_killed_client_takes_its_command_along(script: Path, tmp_path: Path) -> None:
    script.write_text(WAITS, encoding="utf-8")
    client = subprocess.Popen([*forks.interpreter(), str(script), str(tmp_path / "pid")])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    client.kill()
    client.wait()
    assert has_ended(int((tmp_path / "pid").read_text()))


HEEDS = """
import signal, sys, time
from pathlib import Path
def end(number, _):
    sys.exit(number)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
Path(sys.argv[1]).touch()
try:
    time.sleep(300)
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP), (signal.SIGINT, 7)]
)
def test_a_command_gets_the_signals_of_its_client(number: int, status: int, script: Path, tmp_path: Path) -> None:
    script.write_text(HEEDS, encoding="utf-8")
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    client = subprocess.Popen([*forks.interpreter(), str(script), str(tmp_path / "ready")], preexec_fn=heed)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    client.send_signal(number)
    assert client.wait(30) == status


def test_a_group_ends_if_one_process_fails(script: Path, tmp_path: Path) -> None:
    script.write_text(WAITS, encoding="utf-8")
    done = forks.run_processes(str(script), str(tmp_path / "pid"))
    assert (done.returncode, done.stdout) == (1, "the process of rank 1 fails\n")
