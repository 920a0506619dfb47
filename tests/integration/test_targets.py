"""Every export target holds the rounded weights that training used. Code from other projects decodes the exports."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from breaking import change
from conftest import SHORT, run_program
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.models import references
from pipeline.models.weights import Weights
from pipeline.runs import artifacts

gguf = importlib.import_module("gguf")
quants = importlib.import_module("gguf.quants")

EXPERTS = ("model.layers.0.mlp.experts.", "model.layers.1.mlp.experts.")
STACKS = tuple(f"{prefix}{stack}" for prefix in EXPERTS for stack in ("gate_up_proj", "down_proj"))
ORIGINAL_KEYS = {
    *("num_hidden_layers", "num_experts", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size"),
    *("swiglu_limit", "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window"),
    *("initial_context_length", "rope_theta", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta"),
}
"""The fields of ModelConfig in gpt-oss 0.0.9. This class takes the keys of config.json as arguments."""

Tensors = dict[str, Tensor]


def export_as(run: Path, into: Path, target: str, *settings: str, source: str = "qat") -> Path:
    arguments = ("recipe=smoke", f"run_dir={into / target}", f"export.source={run / source}", f"export.target={target}")
    assert run_program("stage=export", *arguments, *settings) == 0
    return into / target / "export"


def read_tensors(directory: Path) -> Tensors:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def released(smoke_run: Path) -> Tensors:
    """The MXFP4 export of the run."""
    return read_tensors(smoke_run / "export")


@pytest.fixture(scope="module")
def values(released: Tensors) -> Tensors:
    """Expert weights (E, in, out), decoded by transformers."""
    return {
        name: convert_moe_packed_tensors(released[f"{name}_blocks"], released[f"{name}_scales"], dtype=torch.float32)
        for name in STACKS
    }


def test_bf16_is_the_rounded_values_as_transformers_loads_them(
    smoke_run: Path, values: Tensors, released: Tensors, tmp_path: Path
) -> None:
    directory = export_as(smoke_run, tmp_path, "bf16")
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name].float(), values[name]) for name in STACKS)
    rest = [name for name in released if not name.startswith(STACKS)]
    assert len(rest) == 29
    assert all(torch.equal(held[name], released[name]) for name in rest)
    assert held["lm_head.weight"].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())


def test_openai_is_the_same_bytes_under_the_names_of_the_reference_code(
    smoke_run: Path, released: Tensors, tmp_path: Path
) -> None:
    directory = export_as(smoke_run, tmp_path, "openai")
    original = read_tensors(directory)
    assert len(original) == 3 + 2 * 15
    for layer, prefix in enumerate(("model.layers.0.", "model.layers.1.")):
        for kind in ("weight", "bias"):
            parts = [released[f"{prefix}self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            assert torch.equal(original[f"block.{layer}.attn.qkv.{kind}"], torch.cat(parts))
        pairs = {
            "attn.norm.scale": "input_layernorm.weight",
            "attn.sinks": "self_attn.sinks",
            "attn.out.weight": "self_attn.o_proj.weight",
            "attn.out.bias": "self_attn.o_proj.bias",
            "mlp.norm.scale": "post_attention_layernorm.weight",
            "mlp.gate.weight": "mlp.router.weight",
            "mlp.gate.bias": "mlp.router.bias",
            "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
            "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
            "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
            "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
            "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
            "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
        }
        for ours, theirs in pairs.items():
            assert torch.equal(original[f"block.{layer}.{ours}"], released[prefix + theirs]), ours
    assert torch.equal(original["unembedding.weight"], released["lm_head.weight"])
    assert torch.equal(original["embedding.weight"], released["model.embed_tokens.weight"])
    assert torch.equal(original["norm.scale"], released["model.norm.weight"])
    assert json.loads((directory / "config.json").read_text()).keys() == ORIGINAL_KEYS


def test_gguf_holds_the_values_as_its_own_library_reads_them(
    smoke_run: Path, values: Tensors, released: Tensors, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(export_as(smoke_run, tmp_path, "gguf") / "model.gguf")
    tensors = {
        each.name: torch.tensor(quants.dequantize(each.data, each.tensor_type), dtype=torch.float32)
        for each in reader.tensors
    }
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    assert len(tensors) == 3 + 2 * 19
    for layer, prefix in enumerate(EXPERTS):
        gate_up, down = (values[f"{prefix}{stack}"].transpose(1, 2) for stack in ("gate_up_proj", "down_proj"))
        assert torch.equal(tensors[f"blk.{layer}.ffn_gate_exps.weight"], gate_up[:, 0::2])
        assert torch.equal(tensors[f"blk.{layer}.ffn_up_exps.weight"], gate_up[:, 1::2])
        assert torch.equal(tensors[f"blk.{layer}.ffn_down_exps.weight"], down)
        assert types[f"blk.{layer}.ffn_down_exps.weight"] == "MXFP4"
        bias = released[f"{prefix}gate_up_proj_bias"].float()
        assert torch.equal(tensors[f"blk.{layer}.ffn_gate_exps.bias"], bias[:, 0::2])
        assert torch.equal(tensors[f"blk.{layer}.ffn_up_exps.bias"], bias[:, 1::2])
        query = released[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert torch.equal(tensors[f"blk.{layer}.attn_q.weight"], query.float())
        assert types[f"blk.{layer}.attn_q.weight"] == "BF16"
        sinks = released[f"model.layers.{layer}.self_attn.sinks"]
        assert torch.equal(tensors[f"blk.{layer}.attn_sinks.weight"], sinks.float())
    assert torch.equal(tensors["output.weight"], released["lm_head.weight"].float())


def test_gguf_describes_the_model_and_its_tokenizer(smoke_run: Path, tmp_path: Path) -> None:
    directory = export_as(smoke_run, tmp_path, "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(directory / "model.gguf").fields.items()}
    config = json.loads((smoke_run / "export" / "config.json").read_text())
    vocabulary = json.loads((smoke_run / "export" / "tokenizer.json").read_text())["model"]["vocab"]
    assert fields["general.architecture"] == "gpt-oss"
    assert fields["gpt-oss.block_count"] == config["num_hidden_layers"]
    assert fields["gpt-oss.expert_used_count"] == config["num_experts_per_tok"]
    assert fields["gpt-oss.attention.sliding_window"] == config["sliding_window"]
    assert fields["gpt-oss.rope.scaling.factor"] == config["rope_scaling"]["factor"]
    assert fields["tokenizer.ggml.eos_token_id"] == config["eos_token_id"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == config["vocab_size"]
    assert all(tokens[i] == token for token, i in vocabulary.items())
    assert "<|channel|>" in fields["tokenizer.chat_template"]
    assert not list(directory.glob("*.tmp"))


def test_nvfp4_of_a_model_trained_for_mxfp4_holds_the_same_values(
    smoke_run: Path, values: Tensors, tmp_path: Path
) -> None:
    tensors = read_tensors(export_as(smoke_run, tmp_path, "nvfp4"))
    for name in STACKS:
        assert torch.equal(dequantize_experts(tensors, name), values[name])


def test_nvfp4_of_a_model_trained_for_it_holds_the_rounded_values_of_training(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("source", "upcast", "sft"):
        shutil.copytree(smoke_run / name, run / name)
    settings = ("recipe=smoke", f"run_dir={run}", "format=nvfp4_w4a4", *SHORT)
    assert run_program("stage=quantize", *settings) == 0
    assert run_program("stage=export", *settings, "export.target=nvfp4") == 0
    tensors = read_tensors(run / "export")
    weights = Weights(references.of_artifact(artifacts.load(run / "quantize")))
    for name in STACKS:
        assert torch.equal(dequantize_experts(tensors, name), weights.read_effective(name).float())
        assert tensors[f"{name}_input_scale"].shape == ()
        assert float(tensors[f"{name}_input_scale"]) > 0
    record = json.loads((run / "export" / "hf_quant_config.json").read_text())
    assert record["quantization"]["quant_algo"] == "NVFP4"
    assert run_program("stage=verify", *settings) == 0
    change(f"{STACKS[0]}_input_scale", lambda scale: scale * 2)(run / "export", run)
    assert run_program("stage=verify", *settings) == 1
    report = json.loads((run / "verify" / "report.json").read_text())
    assert any(problem.startswith(f"{STACKS[0]}_input_scale: 1 of 1") for problem in problems_of(report))


def problems_of(report: dict) -> list[str]:
    return [problem for check in report["checks"] for problem in check["problems"]]


def dequantize_experts(tensors: Tensors, name: str) -> Tensor:
    """Decode experts one by one, because ModelOpt's decoder takes only one tensor scale. Return (E, in, out)."""
    packed = tensors[name].transpose(1, 2)
    scales = tensors[f"{name}_weight_scale"].transpose(1, 2)
    experts = []
    for codes, scale, unit in zip(packed, scales, tensors[f"{name}_weight_scale_2"], strict=True):
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        tensor = NVFP4QTensor(shape, torch.float32, codes.contiguous())
        experts.append(tensor.dequantize(scale=scale.contiguous(), double_scale=unit, block_sizes={-1: 16}))
    return torch.stack(experts).transpose(1, 2)


@pytest.mark.parametrize("target", ["mxfp4", "openai", "gguf"])
def test_weights_without_training_are_counted_as_copied(smoke_run: Path, tmp_path: Path, target: str) -> None:
    directory = export_as(smoke_run, tmp_path, target, source="upcast")
    details = artifacts.load(directory).details
    assert details["copied_experts"] == 2 * 2 * 8
    assert details["survival"] == 0 and details["relative_squared_error"] == 0
    assert details["account"] == {**dict.fromkeys(details["account"], 0), "kept": None}


@pytest.mark.parametrize("target", ["openai", "nvfp4", "gguf", "bf16"])
def test_every_target_gives_the_account_of_the_same_rounding(smoke_run: Path, tmp_path: Path, target: str) -> None:
    account = artifacts.load(smoke_run / "export").details["account"]
    assert 0 < account["kept"] < 2 and account["noise"] > 0 and account["scales_up"] > 0
    assert artifacts.load(export_as(smoke_run, tmp_path, target)).details["account"] == account


@pytest.mark.parametrize("rule", ["mse", "nearest"])
def test_experts_of_nvfp4_that_did_not_move_do_not_depend_on_those_that_did(
    rule: str, smoke_run: Path, tmp_path: Path
) -> None:
    """Each expert has its own tensor scale. The rule `mse` keeps all values of MXFP4, and `nearest` changes some."""
    plain = Path(shutil.copytree(smoke_run / "upcast", tmp_path / "plain"))
    (plain / artifacts.ARTIFACT_FILE).unlink()
    for path in plain.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & set(STACKS):
            tensors[name][1::3] *= 1.1
        save_file(tensors, path, {"format": "pt"})
    settings = ("format=nvfp4", f"format.scale_rule={rule}")
    directory = export_as(smoke_run, tmp_path, "nvfp4", *settings, source=str(plain))
    unmoved = export_as(smoke_run, tmp_path / "unmoved", "nvfp4", *settings, source="upcast")
    details = artifacts.load(unmoved).details
    assert (details["copied_experts"], details["survival"], details["changed_scales"]) == (0, 0, 0)
    assert (details["relative_squared_error"] == 0) == (rule == "mse")
    trained, base, found, other = (read_tensors(each) for each in (plain, smoke_run / "upcast", directory, unmoved))
    is_moved = torch.tensor([expert % 3 == 1 for expert in range(8)])
    for name in STACKS:
        values, alone = dequantize_experts(found, name), dequantize_experts(other, name)
        assert torch.equal(values[~is_moved], alone[~is_moved])
        assert torch.equal(alone, base[name].float()) == (rule == "mse")
        error = (values - trained[name].float())[is_moved].square().sum() / trained[name][is_moved].square().sum()
        assert 0 < error < 0.02
    for each in (directory, unmoved):
        proof = (f"verify.checkpoint={each}", f"verify.reference={next((smoke_run / 'source').iterdir())}")
        run = f"run_dir={tmp_path / 'proof' / each.parent.parent.name}"
        assert run_program("stage=verify", "recipe=smoke", *SHORT, run, *proof) == 0


def test_another_format_than_the_trained_one_needs_export_requantize(
    smoke_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("stage=export", "recipe=smoke", f"run_dir={tmp_path}", f"export.source={smoke_run / 'qat'}")
    other = (*arguments, "format=nvfp4", "export.target=nvfp4")
    assert run_program(*other) == 2
    assert "was trained for format=mxfp4" in capfd.readouterr().err
    assert run_program(*other, "export.requantize=true") == 0
    assert "of the experts' weights differ from the weights that" in capfd.readouterr().err
    reference = next((tmp_path / "source").iterdir())
    settings = (f"verify.checkpoint={tmp_path / 'export'}", f"verify.reference={reference}")
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={tmp_path / 'proof'}", *settings) == 0
    details = artifacts.load(tmp_path / "export").details
    trained = Weights(references.of_artifact(artifacts.load(smoke_run / "qat")))
    tensors = read_tensors(tmp_path / "export")
    differing = sum(
        int((dequantize_experts(tensors, name) != trained.read_effective(name).float()).sum()) for name in STACKS
    )
    assert details["other_than_trained"] == differing > 0


def test_an_export_that_only_engines_load_is_not_evaluated(
    smoke_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = export_as(smoke_run, tmp_path, "openai")
    arguments = ("stage=evaluate", "recipe=smoke", f"run_dir={directory.parent}", *SHORT)
    assert run_program(*arguments, "evaluate.source=export") == 2
    assert "only inference engines load" in capfd.readouterr().err


def test_gguf_without_its_package_names_the_package_to_install(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = ("recipe=smoke", f"run_dir={tmp_path}", f"export.source={smoke_run / 'qat'}", "export.target=gguf")
    assert run_program("stage=export", *arguments) == 2
    assert "pip install" in capfd.readouterr().err
    assert not (tmp_path / "export" / "artifact.json").exists()
