"""A stage stops early and keeps the weights with the lowest validation loss, also after an interruption."""

import shutil
from pathlib import Path

import pytest
from conftest import linked, run_program

from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact
from pipeline.runs.metrics import read_metrics
from pipeline.training import callbacks

EVERY = 3
PATIENCE = 3

# With few examples and a high learning rate, the model soon overfits. The rate is constant, without warm-up, so a short
# run has the same steps as the beginning of a longer run.
OVERFITTING = {
    "learning_rate": 0.02,
    "lr_scheduler": "constant",
    "warmup_ratio": 0,
    "max_steps": 60,
    "eval_steps": EVERY,
    "save_steps": EVERY,
    "logging_steps": EVERY,
}


def settings(stage: str, **changes: object) -> list[str]:
    return [f"{stage}.{name}={value}" for name, value in {**OVERFITTING, **changes}.items()]


def prepare(tmp_path: Path, smoke_run: Path, recipe: str, stage: str) -> tuple[Path, list[str]]:
    """Make a run in which all stages before `stage` are complete.

    Returns its directory and the arguments that run the stage.
    """
    before = ("upcast", "sft", "quantize") if stage == "qat" else ("upcast",)
    run_dir = linked(tmp_path / "run", smoke_run, *before)
    return run_dir, [f"stage={stage}", f"recipe={recipe}", "data.max_samples=24"]


def copy(run_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(run_dir, run_dir.with_name(name), symlinks=True))


def validation_losses(directory: Path) -> dict[int, float]:
    """Return step -> validation loss, without the loss before training."""
    return {
        line["step"]: line["eval_loss"] for line in read_metrics(directory) if line.get("eval_loss") and line["step"]
    }


def weights(artifact: Artifact) -> dict[str, bytes]:
    """Return name -> bytes of the safetensors files.

    The other files of adapters are left out, because some contain the name of a directory and so differ between runs.
    """
    return {path.name: path.read_bytes() for path in artifact.directory.glob("*.safetensors")}


@pytest.mark.parametrize(("recipe", "stage"), [("smoke", "sft"), ("smoke_lora", "sft"), ("smoke", "qat")])
def test_uninterrupted_and_resumed_runs_keep_the_best_weights(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stage: str
) -> None:
    run_dir, arguments = prepare(tmp_path, smoke_run, recipe, stage)
    shorter, resumed = copy(run_dir, "shorter"), copy(run_dir, "resumed")
    stopping = settings(stage, early_stopping_patience=PATIENCE)

    assert run_program(*arguments, f"run_dir={run_dir}", *stopping) == 0
    whole = artifacts.load(run_dir / stage)
    losses, best = validation_losses(whole.directory), whole.details["kept_step"]
    assert losses[best] == min(losses.values()) == whole.details["validation_loss"]
    assert whole.details["steps"] == best + PATIENCE * EVERY < OVERFITTING["max_steps"]

    # Another run does not use keep_best, but ends at the best step. It has the same weights.
    until_best = settings(stage, max_steps=best, keep_best=False)
    assert run_program(*arguments, f"run_dir={shorter}", *until_best) == 0
    assert weights(artifacts.load(shorter / stage)) == weights(whole)

    def interrupt(self, args, state, control, **event) -> None:
        on_save(self, args, state, control, **event)
        if state.global_step == best + EVERY:
            raise KeyboardInterrupt

    on_save = callbacks.Checkpoints.on_save
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", interrupt)
        assert run_program(*arguments, f"run_dir={resumed}", *stopping) == 130
    moved = resumed.rename(tmp_path / "moved")
    assert run_program(*arguments, f"run_dir={moved}", *stopping) == 0
    end = artifacts.load(moved / stage)
    assert (end.details, weights(end)) == (whole.details, weights(whole))


def test_the_last_weights_are_kept_if_they_are_the_best_or_keep_best_is_false(smoke_run: Path, tmp_path: Path) -> None:
    run_dir, arguments = prepare(tmp_path, smoke_run, "smoke", "sft")
    kept = {}
    for keep_best in (True, False):
        other = copy(run_dir, f"keep_best_{keep_best}")
        # The last validation is at step 7, which is not a multiple of eval_steps.
        changes = settings("sft", max_steps=7, keep_best=keep_best)
        assert run_program(*arguments, f"run_dir={other}", *changes) == 0
        kept[keep_best] = artifacts.load(other / "sft")
        assert validation_losses(other / "sft").keys() == {3, 6, 7}
    assert kept[True].details["kept_step"] == kept[False].details["kept_step"] == 7
    assert weights(kept[True]) == weights(kept[False])


def test_a_loss_that_never_falls_is_a_warning(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, arguments = prepare(tmp_path, smoke_run, "smoke", "qat")
    never_lower = settings("qat", learning_rate=3, max_steps=6)
    assert run_program(*arguments, f"run_dir={run_dir}", *never_lower) == 0
    assert "[qat] warning: no step had a lower validation loss than the" in capsys.readouterr().err
