"""The compiled update of torchao's optimizers needs as much memory on a GPU as its stand-in allocates."""

from pathlib import Path

from triton_child import NEEDS_COMPILERS, read_report

from pipeline.doctor import low_bit_adam

pytestmark = NEEDS_COMPILERS


def test_the_update_allocates_what_the_stand_in_allocates(tmp_path: Path) -> None:
    found = [tuple(each) for each in read_report("adam_on_pretended_gpu.py", tmp_path)]
    assert {name for name, *_ in found} == set(low_bit_adam.BITS)
    assert found == [(name, values, low_bit_adam.update_bytes(name, values)) for name, values, _ in found]
