"""Parsers raise nothing but UserErrors for damaged input. The inputs are the same in every run.

`scripts/fuzz` runs the same targets with many more inputs, and keeps those that reach new code.
"""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoints.reading import TensorFiles
from pipeline.errors import UserError
from pipeline.runs.artifacts import load

EXAMPLES = {"overrides": 15, "header": 60, "adapter_config": 60, "resume": 20}
"""Examples of slow targets. The others have 150."""
NAMES = (
    *("adapter_config", "artifact", "completions", "config", "conversations", "header", "index", "overrides"),
    *("parquet", "resume", "row_files", "rows"),
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


# Found by fuzzing: a list nested 240 deep as the default of a parameter, which only Arrow can bring.
DEEP_DEFAULT = (
    "fHx8jiwsJyw7Ozs7Ozs7Xjs7Ozs7XjvJxOXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl"
    "5eXl5eXl5eXl5eXl5eXl5eXl5eXlOzs7Ozs7O147Ozs7O147ycTl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl"
    "5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eX/10Q7LTs1NeXl/9dEOy07NTXl5eXl5eXl5eXl5TU1NTU1NQ=="
)


def test_deep_value_that_was_no_json_is_a_user_error(targets: dict[str, fuzzing.Target]) -> None:
    fuzzing.run(targets["conversations"], base64.b64decode(DEEP_DEFAULT))


def test_header_with_a_deep_value_of_an_unknown_key_is_a_user_error(tmp_path: Path) -> None:
    # Found by fuzzing. safetensors ignores the key.
    deep = '{"y":' * 110 + "1" + "}" * 110  # the pairs of an object are lists, so each object counts twice
    header = f'{{"a": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": {deep}}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    with pytest.raises(UserError, match="its header is damaged"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("change", [{"kind": []}, {"kind": {}}, {"files": []}, {"files": {"x": None}}, {"parents": 1}])
def test_field_of_an_artifact_has_another_type(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_text(json.dumps(fuzzing.ARTIFACT | change))
    with pytest.raises(UserError, match=r"artifact\.json: not a readable artifact"):
        load(tmp_path)
