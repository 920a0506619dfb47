"""Adapters that PEFT saved are merged like PEFT merges them, or refused with the setting that stands against it."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor

from pipeline.checkpoints.gpt_oss import plain_tensors
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models import loading, references
from pipeline.models.foreign_adapters import describe_other_base, holds_adapters, read_adapter_config
from pipeline.models.merging import Merger
from pipeline.models.source import Source, sampled_fingerprint
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.verify.adapters import check_merge

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "rank-stabilized": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 32},
        "layers_to_transform": [1],
    },
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Source:
    directory: Path = tmp_path_factory.mktemp("foreign") / "tiny"
    create_tiny(directory, TinyConfig())
    return Source(directory, sampled_fingerprint(directory))


@pytest.fixture
def pefts_own_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo this program's patch of PEFT: load the module again, and take its method."""
    spec = importlib.util.find_spec("peft.tuners.lora.layer")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", fresh.ParamWrapper.get_delta_weight)


def save_adapters(
    base: Source, directory: Path, settings: dict[str, Any], scale: float = 0.05, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Save random adapters with PEFT. Return the weights of the model into which PEFT has merged them."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(loading.load_plain(base.directory, torch.bfloat16), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = parameter.data + scale * torch.randn_like(parameter)
            parameter.data = drawn if dtype is torch.float32 else drawn.to(dtype)
    model.save_pretrained(str(directory))
    return {name: each.detach().clone() for name, each in model.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_as_peft_merges_them(
    kind: str, base: Source, tmp_path: Path, pefts_own_merge: None
) -> None:
    expected = save_adapters(base, tmp_path / "adapters", KINDS[kind])
    weights = Weights(references.on_base(tmp_path / "adapters", base))
    plain = Weights(references.in_directory(base.directory))
    changed = set()
    for name in plain_tensors(weights.shape):
        found = torch.cat([weights.read_trained(name, rows) for rows in weights.parts(name)])
        if name.endswith(("gate_up_proj", "down_proj")):  # the delta of experts is summed in another order
            different = (found != expected[name]).float().mean()
            assert different < 1e-3 and torch.allclose(found.float(), expected[name].float(), rtol=2**-7, atol=1e-3)
        else:
            assert torch.equal(found, expected[name]), name
        if not torch.equal(found, plain.read_trained(name)):
            changed.add(name)
            assert weights.is_changed(name)
    assert len(changed) == len([name for name in expected if not torch.equal(expected[name], plain.read_trained(name))])
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_verify_recomputes_the_merge_without_the_code_that_merges(kind: str, base: Source, tmp_path: Path) -> None:
    save_adapters(base, tmp_path / "adapters", KINDS[kind])
    check = check_merge(Weights(references.on_base(tmp_path / "adapters", base)))
    assert check.problems == [] and check.measured["tensors"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_verify_accepts_a_merge_of_small_factors(
    scale: float, dtype: torch.dtype, base: Source, tmp_path: Path
) -> None:
    save_adapters(base, tmp_path / "adapters", KINDS["both"], scale, dtype)
    assert check_merge(Weights(references.on_base(tmp_path / "adapters", base))).problems == []


def test_verify_tells_stacks_with_equal_outputs_apart(tmp_path: Path) -> None:
    config = TinyConfig(intermediate_size=32)
    assert config.hidden_size == 2 * config.intermediate_size
    create_tiny(tmp_path / "tiny", config)
    base = Source(tmp_path / "tiny", sampled_fingerprint(tmp_path / "tiny"))
    save_adapters(base, tmp_path / "adapters", KINDS["experts"])
    check = check_merge(Weights(references.on_base(tmp_path / "adapters", base)))
    assert check.problems == [] and check.measured["tensors"] == 4


@pytest.mark.parametrize("scale", [0.05, 1e-3])
def test_verify_finds_a_merge_with_another_scale_a_transposed_factor_or_a_missing_layer(
    scale: float, base: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapters(base, tmp_path / "adapters", KINDS["both"], scale)
    merge = Merger.merge

    def wrong(change: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
        def merge_wrongly(self: Merger, name: str, weight: Tensor, first: int = 0) -> Tensor:
            return change(weight, merge(self, name, weight, first))

        monkeypatch.setattr(Merger, "merge", merge_wrongly)
        return check_merge(Weights(references.on_base(tmp_path / "adapters", base))).problems

    adapted = 12  # four projections and two stacks in each of two layers
    assert len(wrong(lambda weight, merged: weight + 0.5 * (merged - weight))) == adapted
    assert len(wrong(lambda weight, merged: weight)) == adapted
    assert len(wrong(lambda weight, merged: weight + (merged - weight).flip(0))) == adapted


def test_verify_finds_a_single_wrong_value(base: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapters(base, tmp_path / "adapters", KINDS["attention"], scale=1e-3)
    merge = Merger.merge

    def merge_wrongly(self: Merger, name: str, weight: Tensor, first: int = 0) -> Tensor:
        merged = merge(self, name, weight, first)
        if name.endswith("layers.0.self_attn.q_proj.weight"):
            merged.view(torch.int16)[0, 0] += 2
        return merged

    monkeypatch.setattr(Merger, "merge", merge_wrongly)
    (problem,) = check_merge(Weights(references.on_base(tmp_path / "adapters", base))).problems
    assert problem.startswith("model.layers.0.self_attn.q_proj.weight: 1 of 8192 values differ")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and this program merges only 'LORA'"),
        ({"use_dora": True}, "use_dora=True: this program cannot merge such adapters"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base's weights"),
        ({"target_modules": ["no_such_layer"]}, "does not fit the base model"),
        ({"target_parameters": ["mlp.router.weight"]}, "adapts model.layers.0.mlp.router"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 64\], but the base model needs \[8, 64\]"),
        ({"target_modules": ["q_proj", "k_proj"]}, "has no base_model.model.model.layers.0.self_attn.k_proj.lora_A"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, "tensors belong to no adapter"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    settings: dict[str, Any], expected: str, base: Source, adapters: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=expected):
        Weights(references.on_base(directory, base))


@pytest.fixture(scope="module")
def adapters(base: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("adapters")
    save_adapters(base, directory, {"target_modules": ["q_proj"]})
    return directory


def test_adapters_without_weights_or_with_pickled_ones_are_refused(adapters: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    (directory / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"the weights of the adapters are missing. Fetch adapter_model.safetensors"):
        read_adapter_config(directory)
    (directory / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"in PyTorch's format .* Load them with PEFT, and save them with"):
        read_adapter_config(directory)


def test_the_fingerprint_is_of_contents(base: Source, adapters: Path, tmp_path: Path) -> None:
    def fingerprint(change: Callable[[dict[str, Any]], object]) -> str:
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(adapters, directory)
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
        change(config)
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config))
        return references.on_base(directory, base).fingerprint

    own = references.on_base(adapters, base).fingerprint
    assert fingerprint(lambda config: config.update(base_model_name_or_path="elsewhere", inference_mode=False)) == own
    assert fingerprint(lambda config: config.update(lora_alpha=9)) != own
    assert references.on_base(adapters, Source(base.directory, "other")).fingerprint != own


def test_another_base_is_named(base: Source, adapters: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base.directory, tmp_path / "moved"))
    path = str(base.directory)
    assert holds_adapters(adapters) and not holds_adapters(moved)
    assert describe_other_base({"base_model_name_or_path": path}, base, path) is None
    assert describe_other_base({"base_model_name_or_path": str(moved)}, base, path) is None
    assert describe_other_base({}, base, path) is None
    message = describe_other_base({"base_model_name_or_path": "owner/base"}, base, path)
    assert message is not None and message.startswith("the adapters were trained on owner/base, which cannot be")
    create_tiny(tmp_path / "other", TinyConfig(seed=1))
    message = describe_other_base({"base_model_name_or_path": str(tmp_path / "other")}, base, path)
    assert message is not None and "which is not the model in model.path=" in message
