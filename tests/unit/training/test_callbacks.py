"""Router load (compared with transformers' router logits), token counts, time left, and removal of old checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import gpt_oss
from transformers import GptOssForCausalLM

from pipeline.config import Sharding
from pipeline.data.harmony import IGNORED
from pipeline.runs.artifacts import WHOLE_FILE
from pipeline.training import callbacks
from pipeline.training.symptoms import ROUTED, UNUSED

EXPERTS, ACTIVE = 8, 2


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    return gpt_oss(64, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, pad_token_id=0)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two examples.

    The first has 7 tokens, 3 of them supervised. The second is padded and has 4 tokens, 1 of them supervised.
    """
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    mask[1, 4:] = 0
    labels[0, 4:] = ids[0, 4:]
    labels[1, 3] = ids[1, 3]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_router_load_equals_that_of_transformers_router_logits_without_padding(
    model: GptOssForCausalLM, batch: dict
) -> None:
    load = callbacks._RouterLoad(model)
    model.eval()
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    figures = load.take()
    real = batch["attention_mask"].flatten().bool()
    assert len(logits) == 2
    for layer, of_layer in enumerate(logits):
        chosen = of_layer[real].topk(ACTIVE).indices
        shares = torch.bincount(chosen.flatten(), minlength=EXPERTS).double() / real.sum()
        assert figures[f"router_largest/layer_{layer}"] == pytest.approx(shares.max().item())
        assert figures[f"router_variation/layer_{layer}"] == pytest.approx(
            (shares.std(correction=0) / shares.mean()).item()
        )


def test_experts_without_tokens_are_counted(model: GptOssForCausalLM, batch: dict) -> None:
    load = callbacks._RouterLoad(model)
    model.eval()
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    real, figures = batch["attention_mask"].flatten().bool(), load.take()
    reached = [of_layer[real].topk(ACTIVE).indices.unique().numel() for of_layer in logits]
    assert figures[UNUSED] == sum(EXPERTS - count for count in reached)
    assert figures[ROUTED] == int(real.sum()) * ACTIVE / EXPERTS


def test_router_load_ignores_training_steps(model: GptOssForCausalLM, batch: dict) -> None:
    load = callbacks._RouterLoad(model)
    model.train()
    model(**batch)
    assert load._counted is None


def test_tokens_are_counted_without_padding_over_the_steps_since_the_last_line(batch: dict) -> None:
    tokens = callbacks.TokenCount()
    tokens.add(batch)
    tokens.add(batch)
    assert tokens.take() == (2 * (7 + 4), 2 * (3 + 1))
    tokens.add(batch)
    assert tokens.take() == (7 + 4, 3 + 1)


def test_a_batch_without_a_mask_has_no_padding(batch: dict) -> None:
    tokens = callbacks.TokenCount()
    tokens.add({"input_ids": batch["input_ids"], "labels": batch["labels"]})
    assert tokens.take() == (2 * 7, 3 + 1)


def save(directory: Path, best: int | None, step: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Write the checkpoint of `step`, and return the trainer's arguments and state at that step."""
    (directory / f"checkpoint-{step}").mkdir()
    state = SimpleNamespace(
        global_step=step,
        is_world_process_zero=True,
        best_model_checkpoint=str(directory / f"checkpoint-{best}") if best else None,
    )
    return SimpleNamespace(output_dir=str(directory)), state


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_newest_and_the_best_checkpoint_are_kept_and_marked_complete(tmp_path: Path) -> None:
    keeper = callbacks.Checkpoints(2, tmp_path, "sft", Sharding.none)
    for step, best in ((2, 2), (4, 2), (6, 2), (10, 2)):
        keeper.on_save(*save(tmp_path, best, step), None)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-10"}
    assert all((path / WHOLE_FILE).is_file() for path in tmp_path.iterdir())


def test_no_checkpoint_is_removed_before_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = callbacks.Checkpoints(2, tmp_path, "sft", Sharding.none)
    for step in (2, 4):
        keeper.on_save(*save(tmp_path, 2, step), None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "wait_for_everyone", interrupt)
    with pytest.raises(KeyboardInterrupt):
        keeper.on_save(*save(tmp_path, 6, 6), None)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 160.0))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    shown = callbacks._Progress("sft")
    state = SimpleNamespace(global_step=1000, max_steps=1130)  # resumed at 1000
    shown.begin(state)
    state.global_step = 1010
    assert shown._time_left(state) == "0:12:00"  # 120 steps of 6 seconds
