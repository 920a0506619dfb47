"""The free host memory respects the limits that Slurm and containers set."""

from pathlib import Path

import psutil
import pytest

from pipeline.errors import MachineError
from pipeline.runs import host_memory


def group(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")
    return directory


def test_a_limit_of_version_2_counts_cached_files_as_free(tmp_path: Path) -> None:
    there = group(tmp_path, memory__max="1000", memory__current="700", memory__stat="anon 400\ninactive_file 250")
    assert list(host_memory.limits([there])) == [1000 - 700 + 250]


def test_a_limit_of_version_1_is_read_too(tmp_path: Path) -> None:
    there = group(tmp_path, memory__limit_in_bytes="1000", memory__usage_in_bytes="900")
    assert list(host_memory.limits([there])) == [100]


def test_a_group_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    unlimited = group(tmp_path / "a", memory__max="max", memory__current="700")
    assert list(host_memory.limits([unlimited, group(tmp_path / "b"), tmp_path / "missing"])) == []


def test_the_groups_of_a_process_are_its_own_and_those_around_it(tmp_path: Path) -> None:
    listing = tmp_path / "cgroup"
    listing.write_text("5:cpu,cpuacct:/other\n4:memory:/slurm/job_7\n0::/user.slice/session\n")
    names = {path.relative_to("/cg").as_posix() for path in host_memory.groups_of(listing, Path("/cg"))}
    assert names == {"memory/slurm/job_7", "memory/slurm", "memory", "user.slice/session", "user.slice", "."}
    assert host_memory.groups_of(tmp_path / "missing", Path("/cg")) == []


def test_the_smallest_limit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = group(tmp_path, memory__max="1000", memory__current="400")
    monkeypatch.setattr(host_memory, "groups_of", lambda *_: [there])
    assert host_memory.available_bytes() == 600
    (there / "memory.max").write_text(str(2**62))
    assert host_memory.available_bytes() <= psutil.virtual_memory().total


def test_a_stage_that_does_not_fit_is_refused_with_both_amounts() -> None:
    host_memory.raise_if_too_small("evaluate", 10**9, "loading the model", available=10**9)
    with pytest.raises(MachineError) as raised:
        host_memory.raise_if_too_small("evaluate", 42 * 10**9, "loading the model", available=32 * 10**9)
    assert str(raised.value).startswith(
        "stage=evaluate: loading the model needs 42.0 GB of host memory, but only 32.0 GB are free."
    )


def test_training_on_a_cpu_needs_more_than_its_tensors() -> None:
    assert host_memory.training_bytes(0) == host_memory.PROGRAM_BYTES
    assert host_memory.training_bytes(10**9) == host_memory.PROGRAM_BYTES + 1_300_000_000
