"""Load a model for training in each of two processes, and report how much host memory this takes.

A launcher starts this script with the directories of a tiny and a larger checkpoint, a way to load them, and a path.
Each process writes its results to this path, with its rank appended.
"""

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from threading import Event, Thread

from command_lines import use_gloo_alone
from torch.distributed.tensor import DTensor

from pipeline.config import LoraConfig, LoraTarget, Precision, Sharding, TrainConfig
from pipeline.models import adapters, loading
from pipeline.models.references import ModelRef
from pipeline.runs.processes import wait_for_everyone

LORA = LoraConfig(rank=2, targets=[LoraTarget.attention, LoraTarget.experts], layers=[1])


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Samples the resident memory every two milliseconds inside a `with` block.

    Attributes:
        bytes: the highest sample, minus the memory that was resident at the beginning.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = Event()
        self._thread = Thread(target=self._sample)

    def __enter__(self) -> "Peak":
        gc.collect()
        self._before = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes() - self._before)


def measure(ref: ModelRef, way: str, precision: Precision) -> dict[str, int]:
    """Load the model, and return three sizes in bytes.

    The sizes are the whole model, the part that this process keeps, and the highest increase in resident memory.
    """
    train = TrainConfig(precision=precision, lora=LORA)
    with Peak() as peak:
        if way == "whole":  # as if each process loaded the model by itself
            model = loading.load_plain(ref.base, loading.TRAIN_DTYPES[precision])
        else:
            attach = partial(adapters.attach, train=train, section="sft")
            model = loading.load_to_train(ref, train, "eager", Sharding[way], attach)
    own = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p.data) for p in model.parameters()]
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    return {"model": size, "held": sum(part.nbytes for part in own), "peak": peak.bytes}


def main(warm_up: Path, directory: Path, way: str, results: Path) -> None:
    precision = Precision.fp32
    if way == "zero3":
        use_gloo_alone()
    measure(
        ModelRef("base", warm_up, warm_up), way, precision
    )  # imports all libraries, so that only weights count below
    found = measure(ModelRef("base", directory, directory), way, precision)
    results.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
    wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
