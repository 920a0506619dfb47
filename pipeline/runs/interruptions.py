"""Say what an interrupted stage has kept, and which command goes on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Stage, TrainConfig
from pipeline.runs import commands
from pipeline.runs.artifacts import ARTIFACT_FILE, CHECKPOINTS_DIR, SHARDS_FILE, WHOLE_FILE
from pipeline.runs.run import Run
from pipeline.runs.training_checkpoints import list_checkpoints, read_step

_work: tuple[Run, Stage] | None = None


@contextmanager
def working(run: Run, stage: Stage) -> Iterator[None]:
    """Inside the block, the stage is in work. An interruption leaves this state for `message`."""
    global _work
    _work = run, stage
    try:
        yield
    except Exception:
        _work = None
        raise
    _work = None


def forget() -> None:
    """Forget the work of an earlier call in the same process."""
    global _work
    _work = None


def message(what: str) -> str:
    """Return the message for an interruption: what happened, what is kept, and the command that goes on."""
    go_on = f"To go on: {commands.resume()}"
    if _work is None:
        return f"{what}. {go_on}"
    run, stage = _work
    directory = run.stage_dir(stage)
    if (directory / ARTIFACT_FILE).is_file():
        return f"{what}. stage={stage.name} is as it was before. {go_on}"
    train = {Stage.sft: run.config.sft, Stage.qat: run.config.qat}.get(stage)
    return f"{what}. stage={stage.name}: {_kept(directory, train)}. {go_on}"


def _kept(directory: Path, train: TrainConfig | None) -> str:
    """Say at which place the next run of a stage starts. `train` are the settings of a stage that trains."""
    if train is not None:
        return _checkpoint(directory, train.save_steps)
    kept = [text for text in _parts(directory) if text]
    return f"kept so far: {' and '.join(kept)}" if kept else "the next run starts from the beginning"


def _checkpoint(directory: Path, save_steps: int) -> str:
    whole = [path for path in list_checkpoints(directory / CHECKPOINTS_DIR) if (path / WHOLE_FILE).is_file()]
    if whole:
        return f"the next run starts from step {read_step(whole[-1])}, its last checkpoint"
    setting = f"{directory.name}.save_steps={save_steps}"
    return f"the next run starts from the beginning, because there is no checkpoint yet ({setting})"


def _parts(directory: Path) -> Iterator[str]:
    """Yield the counts of finished parts: layers, weight files, and measured models with their answers."""
    layers = len(list((directory / CHECKPOINTS_DIR).glob("*/layer-*.safetensors")))
    yield _count(layers, "rounded layer")
    yield _count(sum(_entries(path) for path in directory.rglob(SHARDS_FILE)), "weight file")
    if directory.name == Stage.evaluate.name:
        yield _count(sum(_is_result(path) for path in directory.glob("*.json")), "measured model")
        yield _count(sum(_lines(path) for path in directory.glob("*/generations.jsonl")), "answer")


def _entries(path: Path) -> int:
    return len(json.loads(path.read_text(encoding="utf-8")))


def _is_result(path: Path) -> bool:
    return "figures" in json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _count(number: int, what: str) -> str:
    return "" if not number else f"{number} {what}{'' if number == 1 else 's'}"
