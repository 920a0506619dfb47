"""The settings that a run recorded for itself. A command with `run_dir=` and without `recipe=` uses them.

`<run_dir>/command.yaml` holds overrides, as the command line gave them. A recorded interpolation, such as
`${oc.env:TOKEN}`, stays unresolved.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.overrides import (
    assignment,
    belongs_to_run,
    by_key,
    is_override,
    key_of,
    listed_value,
    override_of,
    plain_value,
)
from pipeline.config.secrets import has_secret
from pipeline.errors import UserError
from pipeline.runs.durable import write_text
from pipeline.runs.settings import BLEND
from pipeline.runs.yaml_files import as_yaml, read_yaml

RECORD_FILE = "command.yaml"

_PATHS = (
    *("base_run", "data.path", "data.validation.path", "evaluate.lm_eval.include_path", "evaluate.prompts.path"),
    *("model.path", "quantize.source", "sft.start", "verify.reference"),
    *("evaluate.source", "export.source", "verify.checkpoint"),
)
"""Settings of a run or of one command that may be paths. A relative path starts at the working directory."""
_PROGRAMS = "verify.python."
_HEADER = "# The settings of this run. Commands with this run_dir and without recipe= use them.\n"


@dataclass(frozen=True)
class OwnSettings:
    """The recorded settings of a run.

    Attributes:
        overrides: key -> override, in the order of the command line.
        working_directory: the directory at which relative paths in `overrides` start.
        config_dir: the directory of further configuration files (`--config-dir`), or None.
        moved: keys whose relative paths are absolute in `overrides`, because this command runs in another directory.
    """

    overrides: dict[str, str]
    working_directory: str
    config_dir: str | None = None
    moved: tuple[str, ...] = ()


def read(run_dir: Path) -> OwnSettings | None:
    """Read the recorded settings of a run. Return None if there are none.

    A recorded relative path becomes absolute if this process runs in another directory, and the path exists in the
    first one. Other relative paths stay: they may be ids of a hub, or the run may have been moved with its files.

    Raises:
        UserError: command.yaml cannot be read, or has another form.
    """
    path = run_dir / RECORD_FILE
    try:
        found = read_yaml(path)
        overrides, directory, more = found["overrides"], found["working_directory"], found["config_dir"]
        if not _are_overrides(overrides) or not isinstance(directory, str) or not isinstance(more, str | None):
            raise ValueError("a value has the wrong type")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except KeyError as error:
        raise _unreadable(path, f"{error.args[0]} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    here = {override: from_here(override, Path(directory)) for override in overrides}
    moved = tuple(key_of(override) for override in overrides if here[override] != override)
    return OwnSettings(by_key(here[override] for override in overrides), directory, more, moved)


def from_here(override: str, there: Path) -> str:
    """Return the override with an absolute path, if it has a path that is relative to the directory `there`."""
    key, value = key_of(override), plain_value(override)
    if key == BLEND and there != Path.cwd():
        return _blend_from_here(override, there)
    if value is None or not (key in _PATHS or key.startswith(_PROGRAMS)):
        return override
    path = _path_from_here(value, there)
    return override if path == value else assignment(key, path)


def _blend_from_here(override: str, there: Path) -> str:
    parts = listed_value(override)
    if parts is None or not all(isinstance(part, dict) and isinstance(part.get("path"), str) for part in parts):
        return override  # the check of the settings tells what is wrong
    moved = [{**part, "path": _path_from_here(part["path"], there)} for part in parts]
    return override if moved == parts else override_of(BLEND, moved)


def _path_from_here(value: str, there: Path) -> str:
    """Return a path, made absolute if it is relative to another directory and exists there."""
    if Path(value).expanduser().is_absolute():
        return value
    path, here = there / value, Path(value)
    return value if not path.exists() or (here.exists() and here.samefile(path)) else str(path)


def _are_overrides(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and is_override(each) for each in value)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: is not a readable record of the run's settings ({reason}). Delete it, and give recipe= and the"
        " settings on the command line. The next stage then records them again."
    )


def write(run_dir: Path, own: OwnSettings) -> None:
    """Replace the recorded settings of a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "overrides": list(own.overrides.values()),
        "working_directory": own.working_directory,
        "config_dir": own.config_dir,
    }
    write_text(run_dir / RECORD_FILE, _HEADER + as_yaml(content, width=1000))


def recordable(given: dict[str, str]) -> dict[str, str]:
    """Return the overrides that belong to the run. Tokens and passwords are never recorded."""
    return {key: text for key, text in given.items() if belongs_to_run(key) and not has_secret(text)}


def withheld(given: dict[str, str]) -> list[str]:
    """List the keys of the overrides that belong to the run, but are not recorded because they contain a secret."""
    return [key for key, text in given.items() if belongs_to_run(key) and has_secret(text)]
