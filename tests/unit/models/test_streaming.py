"""A streamed model equals the model that transformers loads. It takes no memory until it is filled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import LoraConfig, LoraTarget, Precision, Sharding, TinyConfig, TrainConfig
from pipeline.errors import CheckFailed
from pipeline.models import adapters, loading, saving, sharding, streaming
from pipeline.models.adapted_names import is_factor
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights

CPU = torch.device("cpu")
LORA = TrainConfig(
    precision=Precision.fp32,
    lora=LoraConfig(rank=2, targets=[LoraTarget.attention, LoraTarget.experts], layers=[1]),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    directory = tmp_path_factory.mktemp("streaming") / "packed"
    create_tiny(directory, TinyConfig())
    return ModelRef("source", directory, directory)


@pytest.fixture(scope="module")
def plain(packed: ModelRef) -> ModelRef:
    directory = packed.directory.with_name("plain")
    directory.mkdir()
    saving.write_plain(packed, directory)
    return ModelRef("upcast", directory, directory)


def attach(model: torch.nn.Module) -> torch.nn.Module:
    return adapters.attach(model, LORA, "sft")  # type: ignore[arg-type]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    equal = (torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in other)
    return one.keys() == other.keys() and all(equal)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("source", ["packed", "plain"])
def test_a_streamed_model_has_the_weights_and_buffers_that_transformers_loads(
    source: str, precision: Precision, request: pytest.FixtureRequest
) -> None:
    ref: ModelRef = request.getfixturevalue(source)
    streamed = loading.load_to_train(ref, TrainConfig(precision=precision), "eager")
    loaded = loading.load_plain(ref.base, loading.TRAIN_DTYPES[precision])
    assert same(streamed.state_dict(), loaded.state_dict())
    assert same(dict(streamed.named_buffers()), dict(loaded.named_buffers()))
    assert streamed.generation_config == loaded.generation_config
    assert streamed.config.to_dict() == {**loaded.config.to_dict(), "use_cache": False}


def test_a_model_takes_no_memory_until_it_is_filled(plain: ModelRef) -> None:
    model = streaming.build(plain.base, torch.float32)
    assert all(streaming.is_hollow(parameter) for parameter in model.parameters() if parameter.numel() > 1)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 4 * len(list(model.parameters()))


def test_new_adapters_start_with_the_same_values_on_a_hollow_model(plain: ModelRef) -> None:
    streamed = loading.load_to_train(plain, LORA, "eager", Sharding.none, attach)  # type: ignore[arg-type]
    loaded = attach(loading.load_plain(plain.base, torch.float32))
    assert same(streamed.state_dict(), loaded.state_dict())
    trained = [name for name, p in streamed.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in loaded.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("shared", [Sharding.none, Sharding.zero2])
def test_deepspeed_gets_bf16_weights_under_mixed_precision(shared: Sharding, plain: ModelRef) -> None:
    model = loading.load_to_train(plain, TrainConfig(precision=Precision.mixed_bf16), "eager", shared)
    expected = torch.bfloat16 if shared is Sharding.zero2 else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert sharding.saved_dtype(TrainConfig(), torch.float32, shared) is expected


def test_only_a_part_of_a_tensor_is_in_memory_at_a_time() -> None:
    seen: list[slice] = []

    def read(_: str, rows: slice) -> Tensor:
        seen.append(rows)
        return torch.arange(rows.start, rows.stop)[:, None].expand(-1, 1 << 18)

    found = streaming.read_rows(read, "wide", torch.Size((40, 1 << 18)), torch.float32, CPU, rows=slice(3, 30))
    assert seen == [slice(start, min(start + 4, 30)) for start in range(3, 30, 4)]
    assert torch.equal(found[:, 7], torch.arange(3.0, 30.0))


def test_reading_no_rows_reads_nothing() -> None:
    def read(name: str, rows: slice) -> Tensor:
        raise AssertionError(f"{name} {rows}")

    assert streaming.read_rows(read, "empty", torch.Size((5, 2)), torch.float32, CPU, rows=slice(5, 5)).shape == (0, 2)


def test_a_tensor_of_the_wrong_shape_is_an_error(plain: ModelRef) -> None:
    model = streaming.build(plain.base, torch.float32)
    checkpoint = Checkpoint(plain.base)
    with pytest.raises(CheckFailed, match=r"model.norm.weight: rows 0 to 64 have shape \[96\] on disk"):
        streaming.fill(
            model,
            lambda name, rows: (
                torch.zeros(96) if name == "model.norm.weight" else checkpoint.read_plain(name, rows=rows)
            ),
            CPU,
        )


def test_any_rows_of_an_adapted_weight_can_be_read(plain: ModelRef, tmp_path: Path) -> None:
    model = loading.load_to_train(plain, LORA, "eager", Sharding.none, attach)  # type: ignore[arg-type]
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path))
    weights = Weights(ModelRef("sft", tmp_path, plain.base, adapter=True, dtype=torch.float32))
    for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.1.self_attn.q_proj.weight"):
        whole = weights.read_trained(name)
        for rows in (slice(0, 1), slice(3, 4), slice(2, 7), slice(7, 8), slice(0, len(whole))):
            assert torch.equal(weights.read_rows(name, rows), whole[rows])
