"""Run command lines of the program, and write to a JSON file what happened on the pretended GPU of this process.

A server of tests/fork_server.py runs this script. Usage: pretended_run.py <file>. The JSON file holds a list of
command lines, each a list of arguments. The script writes <file>.outcome.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

import pretended_gpu

from pipeline import __main__ as program
from pipeline.training import trainer
from tests.composing import composed_once


class Training(TypedDict):
    """What happened in a stage that trains.

    Attributes:
        steps: number of optimizer steps.
        devices: the devices and types of the model's parameters after training.
        syncs: the host syncs in optimizer steps, as (source, kind, number). The number is the total of all steps.
    """

    steps: int
    devices: list[list[str]]
    syncs: list[tuple[str, str, int]]


class Outcome(TypedDict):
    """What happened in the process.

    Attributes:
        statuses: the program's exit status for each command line.
        training: what happened in each stage that trains.
        sources: sources of all host syncs, including those outside of optimizer steps.
    """

    statuses: list[int]
    training: dict[str, Training]
    sources: list[str]


def run(lines: list[list[str]]) -> Outcome:
    training: dict[str, Training] = {}
    train = trainer.train

    def train_and_record(inputs: trainer.Inputs, setup: trainer.Setup) -> dict[str, Any]:
        before = Counter(pretended_gpu.SYNCS)
        details = train(inputs, setup)
        syncs = pretended_gpu.SYNCS - before
        training[setup.stage] = {
            "steps": details["steps"],
            "devices": sorted({(str(p.device), type(p.data).__name__) for p in inputs.model.parameters()}),  # type: ignore[misc]
            "syncs": [(sync.source, sync.what, number) for sync, number in syncs.items() if sync.is_in_step],
        }
        return details

    trainer.train = train_and_record
    statuses = []
    for line in lines:
        sys.argv = ["pipeline", *line]
        with composed_once(line):
            statuses.append(program.status(line))
    sources = sorted({sync.source for sync in pretended_gpu.SYNCS})
    return {"statuses": statuses, "training": training, "sources": sources}


def main(file: Path) -> None:
    outcome = run(json.loads(file.read_text(encoding="utf-8")))
    Path(f"{file}.outcome").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
