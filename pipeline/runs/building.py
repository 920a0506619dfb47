"""Build a stage: decide whether there is work, do it, and publish the result.

artifact.json is written last and atomically, so that an interrupted stage never looks complete.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import ArtifactCheck, Stage, rebuilds
from pipeline.config.secrets import without_secrets
from pipeline.errors import MachineError, UserError
from pipeline.runs import (
    commands,
    damage,
    interruptions,
    launches,
    own_settings,
    parts,
    provenance,
    recording,
    stopping,
    up_to_date,
)
from pipeline.runs.artifacts import (
    ARTIFACT_FILE,
    ARTIFACT_VERSION,
    BOOKKEEPING,
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    RECORDS,
    SHARDS_FILE,
    UNFINISHED_FILE,
    Artifact,
    Result,
    digest_of,
    fingerprint_of,
    load,
    take_read,
)
from pipeline.runs.console import say
from pipeline.runs.durable import cut_torn_line, sync_names, sync_tree
from pipeline.runs.inputs import Inputs, list_differences
from pipeline.runs.json_files import seal, write_json
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import all_cores, is_main_process, on_main_process, wait_for_everyone
from pipeline.runs.run import BEING_EMPTIED, Run, write_unfinished
from pipeline.runs.settings import Settings, plain
from pipeline.runs.tracking import log_inputs, log_output, track
from pipeline.runs.yaml_files import as_yaml


@dataclass(frozen=True)
class _Task:
    """A stage to build.

    Attributes:
        run, stage, is_report, keeps_metrics: as for `build`.
        inputs: all inputs of the stage.
        begun: the same inputs, as unfinished.json states them.
        place, directory: directory of the stage, and of its part that is built. They are equal if it has no parts.
    """

    run: Run
    stage: Stage
    inputs: Inputs
    begun: Inputs
    place: Path
    directory: Path
    is_report: bool
    keeps_metrics: bool

    @property
    def keeps_files(self) -> bool:
        """Whether the files of an earlier result stay in the directory."""
        return self.is_report and not self.run.overwrite


def build(
    run: Run,
    stage: Stage,
    *,
    settings: tuple[str, ...],
    parents: Mapping[str, str],
    work: Callable[[Path], Result],
    data: str | None = None,
    resumable_as: Callable[[Settings], Settings] = lambda settings: settings,
    on_every_process: bool = False,
    keeps_metrics: bool = False,
    is_report: bool = False,
) -> Artifact:
    """Run `work`, and publish the payload that it writes. If the stage is up to date, only return its artifact.

    Args:
        run, stage: the run, and the stage to build.
        settings: dotted keys (or sections) of the configuration that the result depends on.
        parents, data: as in `Inputs`.
        work: fills the given directory. The directory may have files of an earlier report or an interrupted run.
        resumable_as: converts the settings to values for unfinished.json. Resuming requires the same values.
        on_every_process: whether all processes call `work`, as in training, or the main process alone.
        keeps_metrics: whether a resumed `work` continues metrics.jsonl, as training does, or writes it again.
        is_report: whether other inputs rebuild the stage. If False, they are an error, which protects models.

    Raises:
        UserError: the directory cannot be written, or holds a complete or unfinished stage with other inputs.
    """
    read, inputs = take_read(), Inputs(run.settings(settings), dict(parents), data)
    begun = replace(inputs, settings=resumable_as(inputs.settings))
    task = _Task(run, stage, inputs, begun, run.place(stage), run.stage_dir(stage), is_report, keeps_metrics)
    if (done := _take_up_to_date(task)) is not None:
        return done
    _raise_if_impossible(task, read)
    artifact = _rebuild(task, work, on_every_process)
    stopping.raise_if_asked(f" after stage={stage.name}")
    return artifact


def _take_up_to_date(task: _Task) -> Artifact | None:
    """Record this command and return the complete stage, or return None if there is work to do."""
    run, directory = task.run, task.directory
    _heed_launch(run, directory, task.inputs, task.is_report)
    if run.overwrite or (done := _find_up_to_date(run, directory, task.inputs, task.is_report)) is None:
        return None
    recording.record(run, task.stage, task.inputs.settings)
    if not task.place.is_symlink():
        _show(task.place, directory)
    return done


def _raise_if_impossible(task: _Task, read: Sequence[Artifact]) -> None:
    """Raise UserError if the directory must not be changed, or CheckFailed if an input in `read` is damaged."""
    up_to_date.flush()
    own = (task.place, task.directory)
    _raise_if_foreign(*own)
    if not (task.is_report or task.run.overwrite):
        _raise_if_unfinished_differs(task.run, task.directory, task.begun)
    _check_inputs(task.run, task.stage, [artifact for artifact in read if artifact.directory not in own])


def _rebuild(task: _Task, work: Callable[[Path], Result], on_every_process: bool) -> Artifact:
    """Do the work in the stage's directory, and publish the result."""
    run, stage, directory, inputs = task.run, task.stage, task.directory, task.inputs
    # Tracking may fail to start, so it starts before anything is deleted.
    with _lock(run, task.place), track(run, stage.name, task.place.parent), interruptions.working(run, stage):
        on_main_process(lambda: recording.record(run, stage, inputs.settings))
        if stage.name in parts.STAGES:
            on_main_process(lambda: parts.settle(task.place, run.part))
            directory = run.stage_dir(stage)
        on_main_process(lambda: _prepare(task, directory))
        commands.mark_begun(stage.name)
        log_inputs(run, inputs.parents, inputs.data)
        result, seconds = _work(lambda: work(directory), on_every_process)
        on_main_process(lambda: _publish(task, directory, result, seconds))
        artifact = load(directory)
        log_output(artifact)
    return artifact


def _heed_launch(run: Run, directory: Path, inputs: Inputs, is_report: bool) -> None:
    """Say that the present launch has rebuilt the stage already, so that `overwrite` does not rebuild it again.

    Several commands may have the name of one launch. So `overwrite` does rebuild a model that was made with other
    inputs, and any result that is damaged.
    """
    if run.overwrite or not rebuilds(run.config.overwrite, run.stage):
        return
    try:
        done = load(directory)
    except UserError:
        run.overwrite = True
        return
    if not is_report and list_differences(Inputs.of(done), inputs):
        run.overwrite = True
        return
    say(done.stage, f"this launch ({launches.present()}) has already rebuilt {directory}")


def _check_inputs(run: Run, stage: Stage, inputs: Sequence[Artifact]) -> None:
    """With artifacts.check=full, compare the files of the inputs with their digests.

    Raises:
        CheckFailed: a file has changed since its stage wrote it.
    """
    if run.config.artifacts.check is ArtifactCheck.full:
        on_main_process(lambda: damage.raise_if_damaged(inputs, stage.name))


def _work(work: Callable[[], Result], on_every_process: bool) -> tuple[Result | None, float]:
    """Do the work, and measure the time until all processes have ended. Only the main process must have a result."""
    started = time.monotonic()
    result: Result | None = None
    if on_every_process:
        result = work()
    elif is_main_process():
        with all_cores():
            result = work()
    wait_for_everyone()
    return result, time.monotonic() - started


def _find_up_to_date(run: Run, directory: Path, inputs: Inputs, is_report: bool) -> Artifact | None:
    """Return the complete stage if it was made with these inputs, or None if there is work to do.

    Raises:
        UserError: a model was made with other inputs. A report with other inputs is rebuilt instead.
    """
    if not (directory / ARTIFACT_FILE).is_file():
        return None
    done = load(directory)
    differences = list_differences(Inputs.of(done), inputs)
    if differences and not is_report:
        raise _changed(run, done.directory, "is complete, but was made with other inputs", differences)
    if differences:
        say(done.stage, f"made anew, since {'; '.join(differences)}")
        return None
    up_to_date.report(done.stage, done.directory)
    _clear_work(done.directory)
    return done


@contextmanager
def _lock(run: Run, directory: Path) -> Iterator[None]:
    """Lock a stage's directory. Without a lock, two runs could mix their files, and the result would look complete."""
    if not is_main_process():
        yield
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = (directory.parent / f".{directory.name}.lock").open("w")
    except OSError as error:
        raise run.not_writable(directory, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory}: another run is working there. Wait for it, or set another run_dir."
            ) from error
        except OSError as error:
            raise MachineError(
                f"{directory.parent}: the file system cannot lock files ({error.strerror}), so two runs could mix their"
                " files. Set run_dir to another file system."
            ) from error
        yield


def _show(place: Path, directory: Path) -> None:
    if directory != place and is_main_process():
        parts.show(directory)


def _prepare(task: _Task, directory: Path) -> None:
    """Prepare the directory for work. Delete all files, except those of an interrupted run or an earlier report.

    unfinished.json first states that the directory is being emptied. It states the inputs only when the directory is
    empty. So work that is interrupted in between never mixes with files that were made from other inputs.
    """
    run, place, keeps_files = task.run, task.place, task.keeps_files
    if (directory / ARTIFACT_FILE).is_file() and not run.overwrite and not keeps_files:
        raise UserError(f"{directory}: another run has just completed this stage. Run the same command again.")
    try:
        if place != directory:
            if not keeps_files:
                _raise_if_linked(place)
            parts.hide(place, directory.name)
        directory.mkdir(parents=True, exist_ok=True)
        before = run.read_unfinished(directory)
        if _resumes(before, task.begun) and not (directory / ARTIFACT_FILE).exists():
            say(task.stage.name, f"resuming what was interrupted in {directory}")
            if task.keeps_metrics:
                cut_torn_line(directory / METRICS_FILE)
            else:
                (directory / METRICS_FILE).unlink(missing_ok=True)
        else:
            if not keeps_files:
                _raise_if_linked(directory)
            write_unfinished(directory, BEING_EMPTIED)
            (directory / ARTIFACT_FILE).unlink(missing_ok=True)
            if keeps_files:
                (directory / METRICS_FILE).unlink(missing_ok=True)
            else:
                _empty(directory)  # The earlier result has other inputs, and the user has set overwrite=true.
            write_unfinished(directory, task.begun.plain())
        sync_names(directory, run.directory)
        (directory / CONFIG_FILE).write_text(as_yaml(plain(run.config)), encoding="utf-8")
    except OSError as error:
        raise run.not_writable(directory, error) from error


def _resumes(before: Mapping[str, object] | None, begun: Inputs) -> bool:
    return before is not None and before != BEING_EMPTIED and not list_differences(Inputs.read(before), begun)


def _raise_if_linked(directory: Path) -> None:
    """Raise UserError if a directory that would be emptied is a link. Another run may use the files behind it."""
    if directory.is_symlink() and any(directory.iterdir()):
        raise UserError(
            f"{directory}: is a symbolic link to {directory.resolve()}, whose files would be deleted. Remove the link,"
            " or set another run_dir."
        )


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED_FILE:
            path.unlink()


def _publish(task: _Task, directory: Path, result: Result | None, seconds: float) -> None:
    assert result is not None
    found = fingerprint_of(directory, result.digests)
    records = {name: digest_of(directory / name) for name in RECORDS if (directory / name).is_file()}
    model, name = task.run.config.model, task.stage.name
    record = {
        "version": ARTIFACT_VERSION,
        "stage": name,
        "kind": result.kind.name,
        "format": result.format,
        "fake_quantized": result.fake_quantized,
        "scale_rule": result.scale_rule,
        "fingerprint": found.fingerprint,
        **task.inputs.plain(),
        "base_model": {"path": without_secrets(model.path), "revision": model.revision},
        "details": result.record.details(),
        "files": found.sizes,
        "digests": {**found.digests, **records},
        "seconds": round(seconds, 3),
        **provenance.record(),
        **launches.note(),
    }
    sync_tree(directory)  # artifact.json must not reach the disk before the files that it describes
    write_json(directory / ARTIFACT_FILE, seal(record))
    _clear_work(directory)
    _show(task.place, directory)
    say(name, f"done in {seconds:.1f} s: {directory}")


def _clear_work(directory: Path) -> None:
    """Remove the files that only an unfinished stage needs. Call this only after artifact.json is written."""
    if is_main_process():
        shutil.rmtree(directory / CHECKPOINTS_DIR, ignore_errors=True)
        (directory / UNFINISHED_FILE).unlink(missing_ok=True)
        for shards in directory.rglob(SHARDS_FILE):
            shards.unlink()


def _raise_if_foreign(place: Path, directory: Path) -> None:
    """Raise UserError if a directory has files, but neither of the files that every stage's directory has.

    A kill may leave unfinished.json under its temporary name. It is then the only file.
    """
    if place != directory and parts.has_foreign_files(place):
        raise _foreign(place)
    ours = (directory / ARTIFACT_FILE).is_file() or (directory / UNFINISHED_FILE).is_file()
    if not ours and directory.is_dir() and {path.name for path in directory.iterdir()} - {f"{UNFINISHED_FILE}.tmp"}:
        raise _foreign(directory)


def _foreign(directory: Path) -> UserError:
    return UserError(
        f"{directory}: holds files that this program did not write. Move them away, or set another run_dir."
    )


def _raise_if_unfinished_differs(run: Run, directory: Path, begun: Inputs) -> None:
    """Raise UserError if a directory holds unfinished work with other inputs. It is protected like a complete stage."""
    before = run.read_unfinished(directory)
    if before == BEING_EMPTIED:
        return
    made = [path for path in directory.rglob("*") if path.is_file() and path.name not in BOOKKEEPING]
    if before is not None and made and (differences := list_differences(Inputs.read(before), begun)):
        what = "is unfinished, and was begun with other inputs"
        raise _changed(run, directory, what, differences, "Go on with the same inputs, or rebuild it")


def _changed(
    run: Run, directory: Path, what: str, differences: list[str], remedy: str = "Go back to them, or rebuild it"
) -> UserError:
    place = commands.locate(directory)
    assert place is not None
    command = run.command(place.stage, *place.target, "overwrite=true")
    return UserError(
        f"{directory} {what}: {'; '.join(differences)}. {remedy}: {command}. To keep it, use another run_dir."
        f"{_own_settings_hint(run)}"
    )


def _own_settings_hint(run: Run) -> str:
    command = commands.current()
    if command is None or command.uses_own_settings or own_settings.read(run.directory) is None:
        return ""
    return " Without recipe=, the command takes the settings of the run."
