"""The config groups: folders of ready-made settings, of which the command line chooses one file each."""

from dataclasses import dataclass
from pathlib import Path

RECIPE = "recipe"
"""The group of the recipes. Its files are in recipes/, and the files of all other groups are in conf/<group>/."""

GROUPS = {
    RECIPE: "the experiment, as changes to the defaults",
    "model": "the checkpoint to start from",
    "data": "the data set",
    "train@sft": "full, lora or bf16_parts, for SFT",
    "train@qat": "full, lora or bf16_parts, for QAT",
    "format": "the 4-bit format",
    "eval": "prompts and task suites to evaluate, in addition to the validation loss",
    "sharding": "how training processes share a model",
    "tracking": "a tracker that also gets the metrics: wandb, tensorboard or mlflow",
}
"""Name of a group, as the command line writes it -> what it chooses."""


@dataclass(frozen=True)
class Folders:
    """The two folders with configuration files: conf/ and recipes/."""

    conf: Path
    recipes: Path

    def choices(self, group: str) -> list[str]:
        """List the choices of a group. The group's name may end with a package, as in `train@sft`."""
        return sorted(path.stem for path in self._folder(group).glob("*.yaml"))

    def file(self, group: str, choice: str) -> Path:
        """Return the file of a choice."""
        return self._folder(group) / f"{choice}.yaml"

    def _folder(self, group: str) -> Path:
        return self.recipes if group == RECIPE else self.conf / group.partition("@")[0]
