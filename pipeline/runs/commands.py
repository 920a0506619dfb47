"""Commands of this program, as messages show them, and the command that runs now."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ExportTarget, PipelineConfig, Stage
from pipeline.config.controls import CONTROL_FILE
from pipeline.config.controls import DIRECTORY as CONTROLS_DIR
from pipeline.config.groups import RECIPE
from pipeline.config.overrides import assignment, belongs_to_run, by_key, key_of, override_of, show_arguments
from pipeline.config.pipeline import CONTROLS
from pipeline.config.secrets import has_secret
from pipeline.runs import launches, own_settings
from pipeline.runs.paths import absolute
from pipeline.runs.settings import choose_settings
from pipeline.runs.yaml_files import read_yaml, value_at

_CHOOSES_PLACE = ("stage", "run_dir", "overwrite")
_ASKED = {
    Stage.doctor: ("doctor",),
    Stage.export: ("export.source",),
    Stage.verify: ("verify.checkpoint",),
    Stage.evaluate: ("evaluate.source", "evaluate.endpoint"),
    Stage.compare: ("compare.runs",),
    Stage.publish: ("export.source", "export.push_to_hub"),
    Stage.serve: ("export.source", "serve"),
}
"""Keys and sections that belong to one command and not to the run, by the stage that reads them."""
_RECORDED = (Stage.export, Stage.verify, Stage.evaluate, Stage.compare)
"""Stages whose result depends on these keys. The stage's own config.yaml has recorded them."""
_REBUILD = "overwrite=true"


@dataclass
class Command:
    """The command that runs now: one job of a sweep, or the only job.

    Attributes:
        arguments: the command line.
        overrides: key -> override. It has the overrides of the command line, and those that the run had recorded.
        stage: name of the stage.
        run_dir: directory of the run.
        is_sweep: whether the command line asks for a sweep.
        uses_own_settings: whether the command line took its settings from the run.
        config_dir: directory of further configuration files, or None.
        pending: stages that the user asked to rebuild, and that have not begun yet.
        kept: keys and sections of recorded settings that a stage keeps although the command line does not give them.
    """

    arguments: list[str]
    overrides: dict[str, str]
    stage: str
    run_dir: str
    is_sweep: bool = False
    uses_own_settings: bool = False
    config_dir: str | None = None
    pending: list[str] = field(default_factory=list)
    kept: tuple[str, ...] = ()


_current: Command | None = None


def begin(command: Command) -> None:
    """Declare the command that runs from now on."""
    global _current
    _current = command


def forget() -> None:
    """Forget the command of an earlier call in the same process."""
    global _current
    _current = None


def current() -> Command | None:
    """Return the command that runs now. It is None if code uses the stages without a command line."""
    return _current


def mark_begun(stage: str) -> None:
    """State that a stage has begun, or a control is made, so that resuming it must not rebuild it once more."""
    if _current is not None:
        _current.pending = [name for name in _current.pending if name.partition("/")[0] != stage]


def asked(stage: Stage) -> list[str]:
    """Return the overrides with which the present command alone says what a stage does, such as `export.source=…`."""
    given = {} if _current is None else _current.overrides
    return [text for key, text in given.items() if _concerns(key, stage) and not has_secret(text)]


def _concerns(key: str, stage: Stage) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in _ASKED.get(stage, ()))


def recorded(directory: Path, stage: Stage) -> list[str]:
    """Return the overrides of this kind with which a stage was made, from its config.yaml.

    Without a readable config.yaml there are none. The stage is then damaged, and its other files do not say it either.
    """
    if stage not in _RECORDED:
        return []
    try:
        made = read_yaml(directory / "config.yaml")
    except (OSError, ValueError):
        return []
    keys = _ASKED[stage]
    defaults = choose_settings(PipelineConfig(), keys)
    settings = {key: value for each in keys for key, value in _flat(each, made)}
    found = [override_of(key, value) for key, value in settings.items() if value != defaults.get(key)]
    own = own_settings.read(directory.parent if directory.name in Stage.__members__ else directory.parent.parent)
    kept = [text for text in found if not has_secret(text)]
    return kept if own is None else [own_settings.from_here(text, Path(own.working_directory)) for text in kept]


def _flat(key: str, made: Any) -> Iterator[tuple[str, object]]:
    """Yield the settings under a dotted key of a config.yaml, each with its key. A damaged file may lack them."""
    value = value_at(made, key)
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", each) for name, each in value.items())
    elif value is not None:
        yield key, value


def stage_command(
    stage: Stage, *overrides: str, run_dir: str | None = None, recipe: str = PipelineConfig.recipe
) -> str:
    """Return the command that runs a stage, quoted for a shell.

    Args:
        stage: the stage to run.
        overrides: further settings, each as key=value.
        run_dir: directory of the run, or None for the default.
        recipe: name of the recipe. The default recipe is left out of the command.
    """
    settings = [f"stage={stage.name}"]
    if recipe != PipelineConfig.recipe:
        settings.append(f"recipe={recipe}")
    if run_dir is not None:
        settings.append(assignment("run_dir", run_dir))
    return show_arguments([*settings, *overrides])


def run_command(stage: Stage, run_dir: str, *overrides: str, recipe: str = PipelineConfig.recipe) -> str:
    """Return the command that runs a stage of a run with the run's settings.

    It names the settings that the run has not recorded itself. A stage of a control is run by `stage=controls`.
    """
    if _is_control(absolute(run_dir)):
        return _command_of_control(stage, Path(run_dir), overrides, recipe)
    needed = _needed(run_dir)
    if needed is None:
        return stage_command(stage, *overrides, run_dir=run_dir, recipe=recipe)
    own = {key: text for key, text in needed.items() if key not in (RECIPE, *by_key(overrides))}
    first = [text for key, text in needed.items() if key == RECIPE]
    more = ["--config-dir", _current.config_dir] if first and _current is not None and _current.config_dir else []
    return show_arguments(
        [*more, f"stage={stage.name}", *first, assignment("run_dir", run_dir), *own.values(), *overrides]
    )


def _is_control(directory: Path) -> bool:
    """Return whether a directory is a control's. Any other directory may be a run of the user."""
    return directory.parent.name == CONTROLS_DIR and (directory / CONTROL_FILE).is_file()


def _command_of_control(stage: Stage, control: Path, overrides: Sequence[str], recipe: str) -> str:
    """Return the command that runs a stage of a control, or all its stages for `Stage.controls`.

    A stage that is a link belongs to the main run. With overwrite=true, `stage=controls` would make all controls again.
    So the command names the control, or its stage. The control's stages after it are then rebuilt, too.
    """
    main = str(control.parent.parent)
    if (control / stage.name).is_symlink():
        return run_command(stage, main, *overrides, recipe=recipe)
    named = control.name if stage is Stage.controls else f"{control.name}/{stage.name}"
    further = [f"overwrite={named}" if each == _REBUILD else each for each in overrides]
    return run_command(Stage.controls, main, *further, recipe=recipe)


def rebuild_command(directory: Path) -> str | None:
    """Return the command that rebuilds what a stage's directory holds. Return None if its settings are not known.

    If the present command is about another stage, its settings do not count: the run has recorded those of the stage.
    """
    if (place := locate(directory)) is None:
        return None
    run_dir = str(place.run_dir)
    if _is_control(place.run_dir):
        return run_command(place.stage, run_dir, _REBUILD)
    is_own = _current is not None and absolute(_current.run_dir) == place.run_dir
    if _current is not None and is_own:
        run_dir = _current.run_dir
    if _needed(run_dir) is None:
        return None
    is_present = _current is not None and is_own and _current.stage in (place.stage.name, Stage.all.name)
    named = by_key([*recorded(directory, place.stage), *(asked(place.stage) if is_present else [])]).values()
    if is_present or own_settings.read(place.run_dir) is None:
        return run_command(place.stage, run_dir, *place.target, *named, _REBUILD)
    return stage_command(place.stage, *place.target, *named, _REBUILD, run_dir=run_dir)


@dataclass(frozen=True)
class Place:
    """What a directory of a run holds.

    Attributes:
        stage: the stage.
        run_dir: directory of the run.
        target: the override that names the export target, if the directory belongs to one target. Otherwise empty.
    """

    stage: Stage
    run_dir: Path
    target: tuple[str, ...] = ()


def locate(directory: Path) -> Place | None:
    """Return what `<run_dir>/<stage>` or `<run_dir>/<stage>/<target>` holds. Return None for other directories.

    The target of `<run_dir>/export` is the one that it shows by links (see `parts`).
    """
    above = directory.parent
    if directory.name in Stage.__members__:
        record = directory / "artifact.json"
        return Place(Stage[directory.name], above, _target(record.readlink().parent) if record.is_symlink() else ())
    return Place(Stage[above.name], above.parent, _target(directory)) if above.name in Stage.__members__ else None


def _target(part: Path) -> tuple[str, ...]:
    return (f"export.target={part.name}",) if part.name in ExportTarget.__members__ else ()


def resume() -> str:
    """Return the command that continues the interrupted command. It rebuilds no stage twice.

    The command has overwrite= for the stages that have not begun. A sweep has several jobs, and stage=controls has
    several controls. Their command also sets the name of the interrupted launch (see `launches`). So it does not
    rebuild the jobs and controls which that launch has already rebuilt.
    """
    command = _current
    if command is None:
        return "the same command, without overwrite=true"
    if command.is_sweep:
        arguments = [each for each in command.arguments if each != "overwrite=false"]
        asks = any(key_of(each) == "overwrite" for each in arguments)
        return (launches.prefix() if asks else "") + show_arguments(arguments)
    given = by_key(each for each in command.arguments if "=" in each)
    own = [text for key, text in given.items() if not belongs_to_run(key) and key not in _CHOOSES_PLACE]
    if command.pending:
        own.append(f"overwrite={'true' if command.pending == [command.stage] else ','.join(command.pending)}")
    is_in_parts = any(name.partition("/")[0] in (Stage.controls.name, *CONTROLS) for name in command.pending)
    return (launches.prefix() if is_in_parts else "") + run_command(Stage[command.stage], command.run_dir, *own)


def advise(command: str) -> str:
    """Return the advice to run a command before the present one."""
    return f"Run first: {command}"


def _needed(run_dir: str) -> dict[str, str] | None:
    """Return the overrides that a command for a run must give. Return None if only its recipe is known."""
    own, command = own_settings.read(absolute(run_dir)), _current
    recorded = {} if own is None else own.overrides
    is_own = command is not None and absolute(command.run_dir) == absolute(run_dir)
    is_base = command is not None and not is_own and "base_run" in command.overrides
    if command is None or not (is_own or is_base):
        return None if own is None else {}
    if is_base and own is not None:
        return {}
    wanted = own_settings.recordable(command.overrides)
    if is_base:
        wanted.pop("base_run")
    if set(recorded) - set(wanted) or recorded.get(RECIPE) != wanted.get(RECIPE):
        return wanted  # a command with recipe= does not use what the run has recorded
    return {key: text for key, text in wanted.items() if recorded.get(key) != text}
