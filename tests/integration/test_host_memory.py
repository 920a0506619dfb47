"""While a sharded model is loaded, each process holds only its shard and a part of one tensor in host memory.

With ZeRO-3, it holds a whole stack of experts instead of a part.
"""

import json
from pathlib import Path

import loading_memory
import pytest
from forks import run_processes

from pipeline.config import TinyConfig
from pipeline.models.tiny_model import create_tiny

WIDE = TinyConfig(num_hidden_layers=3, hidden_size=512, intermediate_size=512, num_local_experts=32, shard_bytes=10**8)
_PARTS = 80_000_000  # bytes for a part of a tensor while it is decoded, and for memory that the allocator keeps
_STACK = 4 * WIDE.num_local_experts * WIDE.hidden_size * 2 * WIDE.intermediate_size  # bytes of the largest tensor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    create_tiny(root / "tiny", TinyConfig())
    create_tiny(root / "wide", WIDE)
    return root / "tiny", root / "wide"


def load(way: str, checkpoints: tuple[Path, Path], directory: Path) -> list[dict[str, int]]:
    """Load the wide model in two processes. Returns what each process measured."""
    results = directory / way
    outcome = run_processes(loading_memory.__file__, *map(str, checkpoints), way, str(results))
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    found = [json.loads(results.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    print(way, found)  # pytest shows this if a test fails
    return found


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_each_process_holds_its_shard_and_a_part_of_a_tensor(
    way: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    for found in load(way, checkpoints, tmp_path):
        assert found["model"] > 300_000_000
        assert found["held"] == pytest.approx(found["model"] / 2, rel=0.01)
        # ZeRO-3 shards each stack of experts after it has been read as a whole.
        assert found["peak"] < found["held"] + _PARTS + (_STACK if way == "zero3" else 0)


def test_the_measurement_sees_a_model_that_each_process_loads_as_a_whole(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    for found in load("whole", checkpoints, tmp_path):
        assert found["held"] == found["model"] < found["peak"]
