"""`stage=all` frees the models of a stage before the next one begins."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import SHORT

FEW_STEPS = (
    *("sft.max_steps=2", "sft.eval_steps=2", "sft.save_steps=2"),
    *("qat.max_steps=2", "qat.eval_steps=2", "qat.save_steps=2", "qat.distillation.weight=0.5", "data.max_samples=40"),
)
PROGRAM = """
import gc, json, sys
from pipeline import __main__ as program
from pipeline.runs import one_stage
from transformers import PreTrainedModel
import torch

def release_and_look():
    release()
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (torch.Tensor, PreTrainedModel))}
    left = [each for each in objects if type(each) in kinds]
    models = [type(each).__name__ for each in left if isinstance(each, PreTrainedModel)]
    found.append([sum(each.untyped_storage().nbytes() for each in left if isinstance(each, torch.Tensor)), models])
    gc.freeze()  # a weight of a later stage is a new object, so nobody has to visit the libraries' objects again

found, release = [], one_stage.release
one_stage.release = release_and_look
status = program.status(sys.argv[1:])
print(json.dumps(found))
sys.exit(status)
"""


def test_no_weights_stay_in_memory_between_stages(tmp_path: Path) -> None:
    # In a new process, stages are the first to import some libraries. Such an import can keep a model in memory.
    arguments = ["stage=all", "recipe=smoke_lora", f"run_dir={tmp_path / 'run'}", *SHORT, *FEW_STEPS]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout.splitlines()[-1])
    assert len(left) >= 9  # a measurement after each stage
    assert max(size for size, _ in left) < 1000  # bytes; libraries keep a few scalars
    assert [names for _, names in left] == [[]] * len(left)
