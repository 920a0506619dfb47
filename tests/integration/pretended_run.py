"""Run a command line of the program on a pretended GPU, and write what happened to a JSON file.

Usage: pretended_run.py <file> <number of GPUs> <arguments of the program>...
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

import pretended_gpu

from pipeline import __main__ as program
from pipeline.training import trainer


class Training(TypedDict):
    """What happened in a stage that trains.

    Attributes:
        steps: number of optimizer steps.
        passes: number of forward passes that train.
        devices: the devices and types of the model's parameters after training.
        syncs: host syncs in optimizer steps: source, kind, and number over all steps.
    """

    steps: int
    passes: int
    devices: list[list[str]]
    syncs: list[tuple[str, str, int]]


class Outcome(TypedDict):
    """Exit status of the program, and what happened in each stage that trains."""

    status: int
    training: dict[str, Training]


def main(file: Path, count: int, arguments: list[str]) -> None:
    training: dict[str, Training] = {}
    train = trainer.train

    def train_and_record(inputs: trainer.Inputs, setup: trainer.Setup) -> dict[str, Any]:
        before = Counter(pretended_gpu.SYNCS)
        details = train(inputs, setup)
        syncs = pretended_gpu.SYNCS - before
        training[setup.stage] = {
            "steps": details["steps"],
            "passes": details["steps"] * setup.settings.gradient_accumulation_steps,
            "devices": sorted({(str(p.device), type(p.data).__name__) for p in inputs.model.parameters()}),
            "syncs": [(sync.source, sync.what, number) for sync, number in syncs.items() if sync.is_in_step],
        }
        return details

    trainer.train = train_and_record
    sys.argv = ["pipeline", *arguments]
    with pretended_gpu.gpu(count):
        outcome = Outcome(status=program.status(arguments), training=training)
    file.write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
