"""Parsers raise nothing but UserErrors for damaged input. The inputs are the same in every run.

`scripts/fuzz` runs the same targets with many more inputs, and keeps those that reach new code.
"""

from collections.abc import Iterator
from pathlib import Path

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"overrides": 15, "header": 60, "adapter_config": 60}
"""Examples of slow targets. The others have 150."""
NAMES = (
    *("adapter_config", "artifact", "completions", "config", "conversations", "header", "index", "overrides"),
    *("parquet", "row_files", "rows"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, fuzzing.Target]]:
    yield fuzzing.targets(Path(tmp_path_factory.mktemp("fuzzing")))


def test_every_target_is_tested(targets: dict[str, fuzzing.Target]) -> None:
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_a_user_error(name: str, targets: dict[str, fuzzing.Target]) -> None:
    @settings(
        max_examples=EXAMPLES.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=60))
    def feed(data: bytes) -> None:
        fuzzing.run(targets[name], data)

    feed()


# Inputs that once ended in a traceback, found by fuzzing: target, bytes.
FOUND = (
    ("artifact", bytes([0, 1, 0, 1, 1, 2, 0])),
    ("artifact", bytes([0, 1, 0, 1, 8, 2, 0])),
)


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_earlier_finding_is_a_user_error(name: str, data: bytes, targets: dict[str, fuzzing.Target]) -> None:
    fuzzing.run(targets[name], data)
