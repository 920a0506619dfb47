"""Weights & Biases. This is the only module that imports wandb."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.runs.trackers.tracker import MODEL_FILES, Hint, Item, Reading, TrackedStage, in_one_line

if TYPE_CHECKING:
    import wandb

_DIRECTORY = "wandb"
_UPLOAD_SECONDS = 120.0  # limit for uploads at the end of a stage; `wandb sync` uploads the rest
_LONGEST_TAG = 64  # W&B refuses longer tags
_ALIAS_LENGTH = 12


def environment(directory: Path) -> dict[str, str]:
    """Return variables that put wandb's staged artifacts and logs into the directory of the run."""
    return dict.fromkeys(("WANDB_DATA_DIR", "WANDB_CACHE_DIR"), str(directory / _DIRECTORY))


def check_login() -> None:
    """Raise UserError without a login, because `init` would ask for it at the terminal and wait."""
    import wandb

    quiet = wandb.Settings(silent=True)  # wandb prints nothing; its errors are raised
    is_online = wandb.setup(quiet).settings.mode in ("online", "run", "shared")
    if is_online and not wandb.login(prompt=False, verify=False):
        raise _not_started("no login")


def _not_started(reason: str) -> UserError:
    return UserError(
        f"tracking=wandb: W&B could not be started ({reason}). Log in with `wandb login`, set WANDB_MODE=offline to"
        " upload later, or use tracking=none."
    )


class WeightsAndBiases:
    """A stage as one W&B run. All stages of a pipeline run form one W&B group."""

    title = "W&B"

    def __init__(self, stage: TrackedStage) -> None:
        import wandb

        self._library = wandb
        # wandb raises ValueError for names that W&B refuses, and OSError if its process or its files fail.
        self.failures: tuple[type[Exception], ...] = (wandb.errors.Error, ValueError, OSError)
        self._has_steps = False
        self._files = stage.directory / _DIRECTORY
        try:
            self._run = self._start(stage)
        except self.failures as error:
            raise _not_started(in_one_line(error)) from error

    def _start(self, stage: TrackedStage) -> "wandb.Run":
        check_login()
        return self._library.init(
            project=stage.settings.project,
            entity=stage.settings.entity,
            tags=[tag[:_LONGEST_TAG] for tag in stage.tags],
            group=stage.group,
            name=stage.title,
            id=stage.id,
            job_type=stage.stage,
            resume="allow",
            config=dict(stage.config),
            dir=stage.directory,
            settings=self._library.Settings(
                console="off",
                disable_code=True,
                disable_git=True,  # the commit is in artifact.json, and wandb would add the text of all changes
                allow_val_change=True,
                finish_timeout=_UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    @property
    def hint(self) -> Hint | None:
        """The command that uploads the offline runs."""
        if self._run.disabled or not self._run.offline:
            return None
        return Hint("to upload the offline runs to W&B", "wandb sync", f"{shlex.quote(str(self._files))}/offline-run-*")

    @property
    def rescue(self) -> str:
        """The command that uploads this stage."""
        files = Path(self._run.dir).parent
        return f"To upload what W&B has on disk: wandb sync {shlex.quote(str(files))}"

    @property
    def url(self) -> str | None:
        """Page of the W&B run, or why there is none."""
        if self._run.disabled:
            return "disabled, by WANDB_MODE or `wandb disabled`"
        return None if self._run.offline else self._run.url

    def log(self, reading: Reading) -> None:
        """Log the figures at their step. wandb's own step counter cannot go back, but a resumed stage repeats steps."""
        steps = {} if reading.step is None else {"step": reading.step}
        if steps and not self._has_steps:
            self._run.define_metric("*", step_metric="step")
            self._has_steps = True
        self._run.log({**steps, **reading.numbers, **reading.texts})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a W&B table."""
        table = self._library.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({name: table})

    def log_media(self, images: Mapping[str, Path], pages: Mapping[str, Path]) -> None:
        """Log images as `plots/<name>` and pages as `pages/<name>`."""
        shown: dict[str, wandb.Image | wandb.Html] = {
            f"plots/{name}": self._library.Image(str(path)) for name, path in images.items()
        }
        shown |= {f"pages/{name}": self._library.Html(str(path), inject=False) for name, path in pages.items()}
        self._run.log(shown)

    def use(self, item: Item) -> None:
        """Declare an input. W&B finds the version that another stage made, because equal descriptions have one digest.

        wandb 0.31 refuses `use_artifact` offline. Offline, the draft is therefore logged with the flag that
        `use_artifact` sets for a draft online. `wandb sync` then records the use.
        """
        if self._run.offline:
            self._run._log_artifact(
                self._draft(item), aliases=_aliases(item), is_user_created=True, use_after_commit=True
            )
        else:
            self._run.use_artifact(self._draft(item), aliases=_aliases(item))

    def make(self, item: Item) -> None:
        """Log an output. Its aliases are `latest`, which wandb always adds, and the beginning of its fingerprint."""
        artifact = self._draft(item)
        for name, path in item.files.items():
            # Weights are not copied to wandb's staging directory. The uploads read them where they are.
            artifact.add_file(str(path), name=name, policy="immutable" if item.kind == MODEL_FILES else "mutable")
        self._run.log_artifact(artifact, aliases=_aliases(item))

    def _draft(self, item: Item) -> "wandb.Artifact":
        artifact = self._library.Artifact(item.name, type=item.kind, metadata=dict(item.description))
        with artifact.new_file("description.json", encoding="utf-8") as file:
            json.dump(item.description, file, indent=2, sort_keys=True)
        return artifact

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Put the figures into the summary, which W&B's tables of runs and reports show."""
        self._run.summary.update(dict(figures))

    def finish(self, succeeded: bool) -> None:
        """End the W&B run after its last uploads. The service shows it as failed unless the stage succeeded."""
        self._run.finish(exit_code=0 if succeeded else 1)


def _aliases(item: Item) -> list[str]:
    return [item.fingerprint[:_ALIAS_LENGTH]]
