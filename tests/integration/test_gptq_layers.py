"""GPTQ rounds a model layer by layer, with the Hessians of the rounded model, and resumes at the last layer."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_files import read_files
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.checkpoints.gpt_oss import DOWN, GATE_UP, expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models import loading, losses, saving
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics import gptq as numerics
from pipeline.numerics.codec import fake_quantize, same_bits
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat
from pipeline.quantize import codes, gptq, rounding
from pipeline.quantize.gptq import GptqSettings, round_layers
from pipeline.quantize.rounding import Job
from pipeline.runs import disk

EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 64
SHAPE = TinyConfig(
    num_hidden_layers=3,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
)
"""A small model, because GPTQ takes its time for each column of the experts."""
LENGTHS = (150, 60, 150, 90)
ANY_TOKENS = GptqSettings(damping=0.05, least_tokens=0.01, fallback_seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    create_tiny(directory, SHAPE)
    return directory


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited(base, tmp_path_factory.mktemp("trained"), "experts.", lambda each: each * 1.07)


@pytest.fixture(scope="module")
def whole(base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run, without the states of a layer."""
    directory = tmp_path_factory.mktemp("whole")
    run(job(base, trained), directory)
    names = [f"layer-{layer:03}.{ending}" for layer in range(3) for ending in ("safetensors", "xxh3")]
    assert sorted(read_files(directory)) == names
    return read_files(directory)


def edited(base: Path, directory: Path, part: str, edit: Callable[[Tensor], Tensor]) -> Path:
    """Write the model plain, and edit the tensors whose name has this part."""
    directory.mkdir(exist_ok=True)
    saving.write_plain(ModelRef("base", base, base), directory)
    for path in directory.glob("*.safetensors"):
        tensors = {name: edit(each) if part in name else each for name, each in load_file(path).items()}
        save_file({name: each.contiguous() for name, each in tensors.items()}, path, {"format": "pt"})
    return directory


def job(base: Path, trained: Path, block_format: BlockFormat = MXFP4, rule: str | None = "ceil") -> Job:
    packed, dtype = Checkpoint(base), torch.float32
    return Job(Weights(ModelRef("x", trained, trained, dtype=dtype)), packed, packed, block_format, rule, None, "cpu")


def batches(lengths: tuple[int, ...] = LENGTHS) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]
    return losses.batches([{"input_ids": each, "labels": each} for each in ids], 2, 0)


def run(
    work: Job, directory: Path, settings: GptqSettings = ANY_TOKENS, lengths: tuple[int, ...] = LENGTHS
) -> codes.LayerCodes:
    return round_layers(work, settings, batches(lengths), attention="eager", directory=directory, output_bytes=0)


def test_hessians_are_those_of_the_tokens_in_the_rounded_model(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(values: Tensor, hessians: Tensor, *others: Any, **more: Any) -> Tensor:
        assert len(hessians) == EXPERTS
        seen.extend(hessians.clone())
        return original(values, hessians, *others, **more)

    original = numerics.round_gptq
    monkeypatch.setattr(numerics, "round_gptq", spy)
    work = job(base, trained)
    done = replace(work, codes=run(work, tmp_path / "codes"))
    (tmp_path / "out").mkdir()
    rounding.write_plain(done, tmp_path / "out")
    expected = rounded_model_hessians(tmp_path / "out")
    assert len(seen) == len(expected) == 3 * EXPERTS * 2
    for found, each in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-3, atol=1e-5)


def rounded_model_hessians(directory: Path) -> list[Tensor]:
    """Compute the mean of x xᵀ in transformers' own run: for each layer, of gate_up_proj and down_proj, by expert."""
    model = loading.load_plain(directory, torch.float32, experts_implementation="eager")
    tokens: dict[tuple[int, int, str], list[Tensor]] = {}
    mask = torch.empty(0)

    def record(number: int) -> Callable[..., None]:
        def hook(module: GptOssExperts, call: tuple[Tensor, ...]) -> None:
            for expert in range(EXPERTS):
                rows = call[0][(call[1] == expert).any(dim=1) & mask.flatten().bool()]
                tokens.setdefault((number, expert, GATE_UP), []).append(rows)
                up = rows @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                tokens.setdefault((number, expert, DOWN), []).append(module._apply_gate(up))

        return hook

    experts = [module for module in model.modules() if isinstance(module, GptOssExperts)]
    for number, module in enumerate(experts):
        module.register_forward_pre_hook(record(number))
    with torch.no_grad():
        for batch in batches():
            mask = batch["attention_mask"]
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    order = [(n, e, name) for n in range(len(experts)) for name in (GATE_UP, DOWN) for e in range(EXPERTS)]
    return [(rows := torch.cat(tokens[key])).T @ rows / len(rows) for key in order]


@pytest.mark.parametrize("rule", [None, "floor"])
@pytest.mark.parametrize("block_format", [MXFP4, NVFP4.with_rule("mse")], ids=lambda each: each.name)
def test_the_written_experts_are_values_that_the_format_keeps(
    block_format: BlockFormat, rule: str | None, base: Path, trained: Path, tmp_path: Path
) -> None:
    work = job(base, trained, block_format, rule)
    done, nearest = replace(work, codes=run(work, tmp_path / "codes")), work
    for name, each in (("gptq", done), ("nearest", nearest)):
        (tmp_path / name).mkdir()
        rounding.write_plain(each, tmp_path / name)
    found, other = Checkpoint(tmp_path / "gptq"), Checkpoint(tmp_path / "nearest")
    for projection in expert_projections(found.shape):
        values = found.read_plain(projection.name)
        assert same_bits(fake_quantize(values.transpose(1, 2), block_format).transpose(1, 2), values)
        assert not same_bits(values, other.read_plain(projection.name))


def test_a_packed_model_has_the_values_of_a_plain_one(base: Path, trained: Path, tmp_path: Path) -> None:
    work = job(base, trained)
    done = replace(work, codes=run(work, tmp_path / "codes"))
    for write, name in ((rounding.write_plain, "plain"), (rounding.write_packed, "packed")):
        (tmp_path / name).mkdir()
        write(done, tmp_path / name)
    plain, packed = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "packed")
    for projection in expert_projections(plain.shape):
        assert same_bits(plain.read_plain(projection.name), packed.read_plain(projection.name))


def test_a_base_that_training_left_alone_keeps_its_bits(base: Path, tmp_path: Path) -> None:
    work = job(base, base, rule=None)
    done = replace(work, codes=run(work, tmp_path / "codes"))
    (tmp_path / "out").mkdir()
    rounding.write_packed(done, tmp_path / "out")
    found, before = Checkpoint(tmp_path / "out"), Checkpoint(base)
    for projection in expert_projections(found.shape):
        assert same_bits(found.read_plain(projection.name), before.read_plain(projection.name))


@pytest.mark.parametrize("limit", [0, 1 << 19], ids=["one", "some"])
def test_the_experts_at_once_change_no_bit(
    limit: int, base: Path, trained: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`whole` was made with all experts of a layer at once, which is the default for models of this size."""
    sizes: list[int] = []

    def spy(values: Tensor, *others: Any, **more: Any) -> Tensor:
        sizes.append(len(values))
        return original(values, *others, **more)

    original = numerics.round_gptq
    monkeypatch.setattr(numerics, "round_gptq", spy)
    work = job(base, trained)
    monkeypatch.setitem(gptq._GROUP_BYTES, "cpu", limit)
    run(work, tmp_path / "several")
    assert max(sizes) < EXPERTS and whole == read_files(tmp_path / "several")


def interrupt_at(write: int, patched: pytest.MonkeyPatch) -> None:
    """Interrupt the run at this write of a file. A half-written file stays behind."""
    original, written = codes._write, []

    def interrupted(path: Path, *others: Any) -> None:
        if len(written) == write:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        original(path, *others)

    patched.setattr(codes, "_write", interrupted)


def test_a_run_interrupted_at_each_file_in_turn_ends_with_the_bytes_of_an_uninterrupted_one(
    base: Path, trained: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are five files: states after the first two layers, each before the layer itself, and the last layer."""
    work = job(base, trained)
    for write in (0, 1, 2, 1, 2):  # counted anew by each run; a run writes the states of an unwritten layer again
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            interrupt_at(write, patched)
            run(work, tmp_path / "resumed")
    started = counted_layers(monkeypatch)
    run(work, tmp_path / "resumed")
    assert started == [2]
    assert whole == read_files(tmp_path / "resumed")


def test_a_resumed_run_rounds_only_the_layers_that_are_missing(
    base: Path, trained: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(base, trained)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(2, patched)  # the first layer is written
        run(work, tmp_path / "resumed")
    started = counted_layers(monkeypatch)
    run(work, tmp_path / "resumed")
    assert len(started) == 2
    assert whole == read_files(tmp_path / "resumed")


@pytest.mark.parametrize("name", ["layer-001.safetensors", "layer-001.xxh3", "states-001.safetensors"])
def test_a_damaged_layer_is_made_again(
    name: str,
    base: Path,
    trained: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, save = job(base, trained), codes.LayerCodes.save

    def interrupted(self: codes.LayerCodes, layer: int, *others: Any) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        save(self, layer, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(codes.LayerCodes, "save", interrupted)
        run(work, tmp_path / "resumed")
    path = tmp_path / "resumed" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run(work, tmp_path / "resumed")
    assert whole == read_files(tmp_path / "resumed")
    assert f"{path.with_suffix('.safetensors')}: differs from the file before" in capsys.readouterr().err


def counted_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of each layer that is rounded."""
    started: list[int] = []

    class Counted(gptq.Walk):
        def layer(self, number: int) -> Any:
            started.append(number)
            return super().layer(number)

    monkeypatch.setattr(gptq, "Walk", Counted)
    return started


@pytest.mark.parametrize("seed", [None, 5])
def test_experts_with_too_few_tokens_are_rounded_by_the_fallback_and_counted(
    seed: int | None, base: Path, trained: Path, tmp_path: Path
) -> None:
    work = job(base, trained)
    tokens = run(work, tmp_path / "all").notes()[0]["tokens"]
    limit = sorted(tokens)[EXPERTS // 2] / INTERMEDIATE  # inputs of down_proj; gate_up_proj has fewer
    done = run(work, tmp_path / "some", GptqSettings(0.05, limit, seed))
    fallen = [expert for expert, count in enumerate(tokens) if count < limit * INTERMEDIATE]
    assert done.notes()[0] == {"tokens": tokens, "fallback": fallen} and 0 < len(fallen) < EXPERTS
    down = work.projections[1]
    (tmp_path / "out").mkdir()
    rounding.write_plain(replace(work, seed=seed), tmp_path / "out")
    expected, found = Checkpoint(tmp_path / "out").read_plain(down.name), done.read(down, slice(None))
    values = found.decode(expected.dtype, "cpu").values
    assert [expert for expert in range(EXPERTS) if same_bits(values[expert], expected[expert])] == fallen


def test_experts_without_a_token_never_get_a_hessian(base: Path, tmp_path: Path) -> None:
    def shun(bias: Tensor) -> Tensor:
        return torch.where(torch.arange(len(bias)) == 2, -1e4, bias.float()).to(bias.dtype)

    shunned = edited(base, tmp_path / "shunned", "router.bias", shun)
    notes = run(job(base, shunned), tmp_path / "codes", replace(ANY_TOKENS, least_tokens=1e-9)).notes()
    assert all(note["tokens"][2] == 0 and note["fallback"] == [2] for note in notes)


def test_a_hessian_that_is_not_positive_definite_is_named(base: Path, trained: Path, tmp_path: Path) -> None:
    name = r"model\.layers\.\d\.mlp\.experts\.\w+: expert \d: quantize\.damping=1e-30: .* not positive definite"
    with pytest.raises(UserError, match=name + r".* larger quantize\.damping"):
        run(job(base, trained), tmp_path / "codes", replace(ANY_TOKENS, damping=1e-30), lengths=(HIDDEN // 2,))


@pytest.mark.parametrize("least_tokens", [ANY_TOKENS.least_tokens, 1e9], ids=["gptq", "fallback"])
def test_inputs_that_are_not_finite_are_named(base: Path, tmp_path: Path, least_tokens: float) -> None:
    bad = edited(base, tmp_path / "bad", "layers.1.self_attn.o_proj.bias", lambda each: each * torch.nan)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: expert \d: .* NaN or Inf"):
        run(job(base, bad), tmp_path / "codes", replace(ANY_TOKENS, least_tokens=least_tokens))


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 16))
    started = counted_layers(monkeypatch)
    with pytest.raises(UserError, match=r"needs 0\.. MB, but the disk has"):
        run(job(base, trained), tmp_path / "codes")
    assert not started and shutil.disk_usage(tmp_path).free == 1 << 16


def test_products_are_exact_whatever_torch_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(numerics, "_factorize", lambda *_: seen.append(torch.get_float32_matmul_precision()) or 1 / 0)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError):
            numerics.round_gptq(torch.ones(1, 32, 32), torch.eye(32)[None], MXFP4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]
