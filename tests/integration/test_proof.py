"""`verify` finds what is wrong with an export, names it, and exits with 1."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHORT, run_program
from safetensors.torch import load_file, save_file

from pipeline import artifacts, models, proof
from pipeline.numerics.formats import MXFP4

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
SINKS = "model.layers.0.self_attn.sinks"
Tensors = dict[str, torch.Tensor]


def swap_nibbles(tensors: Tensors) -> None:
    blocks = tensors[f"{GATE_UP}_blocks"]
    tensors[f"{GATE_UP}_blocks"] = (blocks << 4) | (blocks >> 4)


def flip_one_bit(tensors: Tensors) -> None:
    tensors[f"{DOWN}_blocks"][7, 3, 1, 5] ^= 1


def raise_scales(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_scales"] += 1


def remove_bias_of_scales(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_scales"] -= 127


def put_nan(tensors: Tensors) -> None:
    tensors[f"{DOWN}_scales"][0, 0, 0] = 255


def halve_gate_and_up(tensors: Tensors) -> None:
    for part in ("blocks", "scales"):
        rows = tensors[f"{GATE_UP}_{part}"]
        tensors[f"{GATE_UP}_{part}"] = torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


def exchange_gate_and_up(tensors: Tensors) -> None:
    for part in ("blocks", "scales"):
        rows = tensors[f"{GATE_UP}_{part}"].unflatten(1, (-1, 2))
        tensors[f"{GATE_UP}_{part}"] = rows.flip(2).flatten(1, 2).contiguous()


def permute_experts(tensors: Tensors) -> None:
    for part in ("blocks", "scales"):
        tensors[f"{DOWN}_{part}"] = tensors[f"{DOWN}_{part}"].roll(1, dims=0)


def drop_sinks(tensors: Tensors) -> None:
    del tensors[SINKS]


def drop_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def tie_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def widen_bias(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_bias"] = tensors[f"{GATE_UP}_bias"].float()


def nudge_bias(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_bias"][2, 2] += 0.5


def misspell_scales(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_scale"] = tensors.pop(f"{GATE_UP}_scales")


def leave_adapter(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 64)


def leave_bf16_experts(tensors: Tensors) -> None:
    tensors[GATE_UP] = torch.zeros(8, 64, 192, dtype=torch.bfloat16)


def set_config(**changes: object) -> Callable[[Path], None]:
    def edit(export: Path) -> None:
        config = json.loads((export / "config.json").read_text())
        (export / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def drop_config(key: str) -> Callable[[Path], None]:
    def edit(export: Path) -> None:
        config = json.loads((export / "config.json").read_text())
        del config[key]
        (export / "config.json").write_text(json.dumps(config))

    return edit


def change_template(export: Path) -> None:
    with (export / "chat_template.jinja").open("a") as file:
        file.write(" ")


def drop_generation_config(export: Path) -> None:
    (export / "generation_config.json").unlink()


def leave_stale_shard(export: Path) -> None:
    shutil.copyfile(next(export.glob("model-*.safetensors")), export / "old.safetensors")


TENSOR_MUTATIONS = [
    (swap_nibbles, GATE_UP),
    (flip_one_bit, DOWN),
    (raise_scales, GATE_UP),
    (remove_bias_of_scales, GATE_UP),
    (put_nan, DOWN),
    (halve_gate_and_up, GATE_UP),
    (exchange_gate_and_up, GATE_UP),
    (permute_experts, DOWN),
    (drop_sinks, SINKS),
    (drop_head, "lm_head.weight"),
    (tie_head, "lm_head.weight"),
    (widen_bias, f"{GATE_UP}_bias"),
    (nudge_bias, f"{GATE_UP}_bias"),
    (misspell_scales, f"{GATE_UP}_scales"),
    (leave_adapter, "lora_A"),
    (leave_bf16_experts, GATE_UP),
]
FILE_MUTATIONS = [
    (set_config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (set_config(rope_theta=10000), "rope_theta"),
    (set_config(architectures=["FSDPGptOssForCausalLM"]), "architectures"),
    (drop_config("rope_scaling"), "rope_scaling"),
    (drop_config("quantization_config"), "quantization_config"),
    (change_template, "chat_template.jinja"),
    (drop_generation_config, "generation_config.json"),
    (leave_stale_shard, "old.safetensors"),
]


@pytest.fixture(scope="module")
def trained(smoke_run: Path) -> proof.TrainedModel:
    """The model behind the export, loaded once."""
    ref = models.of_artifact(artifacts.load(smoke_run / "qat"))
    ids = torch.arange(20)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return proof.TrainedModel(ref, [batch], MXFP4)


def source_of(smoke_run: Path) -> Path:
    (directory,) = (smoke_run / "source").iterdir()
    return directory


def verify(smoke_run: Path, work: Path, export: Path) -> int:
    arguments = ("stage=verify", "recipe=smoke", *SHORT, f"run_dir={work}", f"verify.checkpoint={export}")
    return run_program(*arguments, f"model.path={source_of(smoke_run)}")


def problems_of(smoke_run: Path, export: Path, trained: proof.TrainedModel) -> list[str]:
    """What `verify` finds, without the logits."""
    layout = proof.check_layout(export, source_of(smoke_run))
    if layout.problems:
        return layout.problems
    checks = [proof.check_scales(export), trained.check_experts(export), trained.check_others(export)]
    return [problem for check in checks for problem in check.problems]


def rewrite(export: Path, mutate: Callable[[Tensors], None]) -> None:
    (shard,) = export.glob("model-*.safetensors")
    tensors = load_file(shard)
    mutate(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def export(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be broken; its artifact.json still says what it was made from."""
    return Path(shutil.copytree(smoke_run / "export", tmp_path / "export"))


def test_a_good_copy_passes(smoke_run: Path, tmp_path: Path, export: Path) -> None:
    assert verify(smoke_run, tmp_path / "run", export) == 0


def test_nothing_is_found_in_a_good_export(smoke_run: Path, trained) -> None:
    assert problems_of(smoke_run, smoke_run / "export", trained) == []


@pytest.mark.parametrize(("mutate", "named"), TENSOR_MUTATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_wrong_tensor_is_found_and_named(smoke_run: Path, export: Path, trained, mutate, named: str) -> None:
    rewrite(export, mutate)
    problems = problems_of(smoke_run, export, trained)
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize(("mutate", "named"), FILE_MUTATIONS, ids=[named for _, named in FILE_MUTATIONS])
def test_wrong_file_is_found_and_named(smoke_run: Path, export: Path, trained, mutate, named: str) -> None:
    mutate(export)
    problems = problems_of(smoke_run, export, trained)
    assert any(named in problem for problem in problems), problems


@pytest.mark.parametrize("mutate", [swap_nibbles, nudge_bias, drop_sinks])
def test_wrong_export_exits_with_1_and_leaves_a_report_but_no_artifact(
    smoke_run: Path, tmp_path: Path, export: Path, mutate
) -> None:
    rewrite(export, mutate)
    assert verify(smoke_run, tmp_path / "run", export) == 1
    report = json.loads((tmp_path / "run" / "verify" / "report.json").read_text())
    assert any(check["problems"] for check in report["checks"])
    assert not (tmp_path / "run" / "verify" / "artifact.json").exists()


def test_export_of_another_model_is_not_proven(smoke_run: Path, tmp_path: Path, export: Path, capsys) -> None:
    """Without artifact.json nothing says what it was made from: only the layout can be checked, and that is said."""
    (export / "artifact.json").unlink()
    assert verify(smoke_run, tmp_path / "run", export) == 0
    assert "not checked" in capsys.readouterr().out


def test_verify_looks_again_when_the_export_has_changed(tmp_path: Path, smoke_run: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    rewrite(run / "export", flip_one_bit)
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}") == 1
    assert not (run / "verify" / "artifact.json").exists()


def test_directory_that_is_no_export_is_not_right(tmp_path: Path, smoke_run: Path, capsys) -> None:
    assert verify(smoke_run, tmp_path / "run", smoke_run / "sft") == 1
    assert "experts are stored as BF16, not as MXFP4" in capsys.readouterr().out


def test_a_moved_run_is_still_proven(tmp_path: Path, smoke_run: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "moved"))
    assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true") == 0
    report = json.loads((run / "verify" / "report.json").read_text())
    assert report["trained_model"] == str(run / "qat")
