"""While the main process works alone, it uses all cores.

While all processes work, each uses the number of threads that the launcher has set.
"""

import json
import os
from pathlib import Path

from forks import run_processes

SCRIPT = """
import json
import sys
from pathlib import Path

import torch

from pipeline import __main__ as program
from pipeline.runs import building
from pipeline.runs.processes import is_main_process
from pipeline.stages import upcast
from pipeline.training import trainer

seen = {}

def watch(module, name):
    function = getattr(module, name)

    def observed(*args, **more):
        seen.setdefault(name, []).append(torch.get_num_threads())
        return function(*args, **more)

    setattr(module, name, observed)

for module, name in ((upcast, "_upcast"), (building, "_publish"), (trainer, "train")):
    watch(module, name)
run_dir, results = sys.argv[1:]
settings = ["recipe=smoke", f"run_dir={run_dir}", "data.max_samples=40", "sft.max_steps=1", "sft.eval_steps=1"]
for stage in ("upcast", "sft"):
    sys.argv = ["pipeline", f"stage={stage}", *settings, "sft.save_steps=1"]
    assert program.status(sys.argv[1:]) == 0
seen["after"] = [torch.get_num_threads()]
if is_main_process():
    Path(results).write_text(json.dumps(seen))
else:
    assert "_upcast" not in seen and "_publish" not in seen
"""


def test_the_main_process_uses_all_cores_only_while_it_works_alone(tmp_path: Path) -> None:
    script, results = tmp_path / "watched.py", tmp_path / "seen.json"
    script.write_text(SCRIPT, encoding="utf-8")
    outcome = run_processes(str(script), str(tmp_path / "run"), str(results))
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    cores = len(os.sched_getaffinity(0))
    assert json.loads(results.read_text(encoding="utf-8")) == {
        "_upcast": [cores],  # only the main process decodes in the upcast
        "_publish": [cores, cores],  # once in each of the two stages
        "train": [1],  # as OMP_NUM_THREADS says
        "after": [1],
    }
