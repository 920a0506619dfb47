"""Flash kernels with sinks give the same attention as `eager`. These tests run torch's flash kernel for CPUs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.errors import UserError
from pipeline.models import packing_masks, sink_attention
from pipeline.models.attention import FUSED_SINKS
from pipeline.models.sink_attention import Segments
from tests import tiny_models
from tests.attention_cases import (
    LENGTH,
    PARTS,
    SPANS,
    WINDOW,
    WINDOWS,
    assert_as_close_as_eager,
    packed_positions,
    run,
    spans_mask,
)

CASES = ("no padding", "padding on both sides", "a row of padding")  # the second has rows with padding on one side too


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("spans", [SPANS[name] for name in CASES], ids=CASES)
def test_padded_rows_have_the_outputs_and_gradients_of_eager(
    spans: list[tuple[int, int]], window: int | None, precision: str
) -> None:
    is_real = spans_mask(spans)
    segments = sink_attention.padded_rows(is_real)
    assert_as_close_as_eager(segments, is_real, torch.zeros(2, LENGTH), window, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_packed_documents_have_the_outputs_and_gradients_of_eager(window: int | None, precision: str) -> None:
    positions, documents = packed_positions()
    is_real = torch.ones(2, LENGTH, dtype=torch.bool)
    segments = sink_attention.packed_row(positions)
    assert (segments.bounds.tolist(), segments.longest) == ([0, 1, 200, 300, 600], 300)
    assert_as_close_as_eager(segments, is_real, documents, window, precision)


@pytest.mark.parametrize("window", [None, 3])
def test_the_gradients_are_the_derivatives_of_the_output(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8), (4,)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in shapes]
    segments = Segments(torch.tensor([0, 2, 2, 7]), 5)

    def output(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return sink_attention.attend(SimpleNamespace(sinks=sinks), query, key, value, segments, 0.4, 0.0, window)[0]

    assert torch.autograd.gradcheck(output, tensors)


def test_padding_gives_finite_outputs_and_gradients_even_if_it_has_a_loss() -> None:
    is_real = spans_mask(SPANS["a row of padding"])
    everywhere = torch.ones_like(is_real)
    found = run(sink_attention.attend, sink_attention.padded_rows(is_real), torch.bfloat16, WINDOW, everywhere)
    assert all(bool(found[part].isfinite().all()) for part in PARTS)


def test_the_segments_of_padded_rows_are_padding_tokens_and_padding() -> None:
    segments = sink_attention.padded_rows(spans_mask([(0, LENGTH), (5, 210), (0, 0)]))
    assert segments.bounds.tolist() == [0, 0, 300, 300, 305, 510, 600, 900, 900, 900]
    assert (segments.bounds.dtype, segments.longest) == (torch.int32, LENGTH)


def test_padding_between_tokens_is_an_error_and_not_a_wrong_result() -> None:
    with pytest.raises(RuntimeError, match="fused_sinks: padding between the tokens of a row"):
        sink_attention.padded_rows(torch.tensor([[True, False, True]]))


def test_the_bounds_from_positions_are_those_of_trls_collator() -> None:
    examples = [{"input_ids": [5] * 9, "seq_lengths": [4, 1, 4]}, {"input_ids": [5] * 3, "seq_lengths": [3]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    segments = sink_attention.packed_row(batch["position_ids"])
    assert torch.equal(segments.bounds, batch["cu_seq_lens_q"])
    assert segments.longest == batch["max_length_q"]


def model(**changes: Any) -> Any:
    """Make a model whose output depends strongly on attention and sinks, with a window shorter than the rows."""
    made = tiny_models.gpt_oss(50, sliding_window=8, initializer_range=0.3, pad_token_id=0, **changes)
    return made.eval()


def record_masks(ready: Any) -> list[tuple[Any, int]]:
    """In all later forward passes, record the mask and the number of queries of each layer."""
    found: list[tuple[Any, int]] = []
    for layer in ready.model.layers:
        layer.register_forward_pre_hook(
            lambda _, tensors, named: found.append((named["attention_mask"], tensors[0].shape[1])), with_kwargs=True
        )
    return found


def test_packed_rows_take_the_bounds_of_the_collator_and_do_not_read_the_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = [{"input_ids": list(range(1, 31)), "seq_lengths": [11, 19]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    del batch["labels"]
    ready = model(attn_implementation=FUSED_SINKS)
    packing_masks.mask_documents(ready)
    masks = record_masks(ready)
    positions_only = ready(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    monkeypatch.setattr(packing_masks, "packed_row", lambda _: pytest.fail("the positions were read"))
    assert torch.equal(ready(**batch).logits, positions_only)
    assert all(isinstance(mask, Segments) and mask.bounds.tolist() == [0, 11, 30] for mask, _ in masks)
    assert len(masks) == 4
    alone = [ready(input_ids=batch["input_ids"][:, part]).logits for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(torch.cat(alone, 1), positions_only)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_from_prompts_padded_on_the_left_has_the_logits_of_eager(cache: str | None) -> None:
    ids = torch.randint(1, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20) >= torch.tensor([0, 7, 19])[:, None]).long()
    settings = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache is not None:
        settings |= {"cache_implementation": cache, "disable_compile": True}
    eager, ours = (
        model(attn_implementation=name).generate(input_ids=ids * mask, attention_mask=mask, **settings)
        for name in ("eager", FUSED_SINKS)
    )
    assert torch.equal(eager.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), rtol=1e-4, atol=1e-4)


def test_a_model_that_trains_on_packed_rows_can_continue_a_cache_from_positions() -> None:
    ids, positions, logits = torch.arange(1, 14)[None], torch.arange(13)[None], []
    for is_hooked in (False, True):
        made = model(attn_implementation=FUSED_SINKS)
        if is_hooked:
            packing_masks.mask_documents(made)
        cache = DynamicCache(config=made.config)
        for part in (slice(0, 12), slice(12, 13)):
            found = made(input_ids=ids[:, part], position_ids=positions[:, part], past_key_values=cache)
        logits.append(found.logits)
    assert torch.equal(*logits)


def test_only_the_prompt_of_a_dynamic_cache_takes_the_kernel() -> None:
    made = model(attn_implementation=FUSED_SINKS)
    masks = record_masks(made)
    made.generate(input_ids=torch.arange(1, 13)[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [(isinstance(mask, Segments), queries) for mask, queries in masks] == [(True, 12)] * 2 + [(False, 1)] * 4


def test_a_mask_with_another_condition_than_causality_and_window_is_eagers() -> None:
    """transformers adds a condition for packed rows. A caller can pass another condition."""
    config, embedded = model(attn_implementation=FUSED_SINKS).config, torch.empty(1, 6, 0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    masks = create_masks_for_generate(config, embedded, None, None, position_ids=positions)
    assert all(isinstance(mask, Tensor) and mask[0, 0, 4, 1] < 0 == mask[0, 0, 4, 3] for mask in masks.values())
    both_ways = create_causal_mask(
        config, embedded, None, None, or_mask_function=lambda row, head, query, key: key == 5
    )
    assert isinstance(both_ways, Tensor) and both_ways[0, 0, 0, 5] == 0


def test_segments_with_more_keys_than_queries_are_an_error() -> None:
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="3 queries and 5 keys"):
        sink_attention.attend(nn.Module(), query, key, key, Segments(torch.tensor([0, 3]), 3), 1.0)


def test_a_mask_of_the_callers_own_is_respected() -> None:
    ids = torch.arange(1, 13)[None]
    own = torch.zeros(1, 1, 12, 12).masked_fill(torch.eye(12) == 0, torch.finfo(torch.float32).min)
    eager, ours = (model(attn_implementation=name)(ids, attention_mask=own).logits for name in ("eager", FUSED_SINKS))
    assert torch.equal(eager, ours)


def test_checkpointing_changes_no_bit_of_the_gradients() -> None:
    ids = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    gradients = []
    for is_checkpointed in (False, True):
        made = model(attn_implementation=FUSED_SINKS).train()
        if is_checkpointed:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in made.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("sinks" in name for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_frozen_sinks_get_no_gradient() -> None:
    made = model(attn_implementation=FUSED_SINKS)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.endswith("sinks"))
    made(input_ids=torch.arange(1, 13)[None], labels=torch.arange(1, 13)[None]).loss.backward()
    sinks = [parameter for name, parameter in made.named_parameters() if name.endswith("sinks")]
    assert sinks and all(parameter.grad is None for parameter in sinks)
    assert made.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_dropout_in_attention_is_refused() -> None:
    made = model(attn_implementation=FUSED_SINKS, attention_dropout=0.1).train()
    with pytest.raises(UserError, match=r"attention_dropout=0\.1\. Use attn_implementation=eager"):
        made(torch.arange(1, 13)[None])


def test_a_saved_model_does_not_name_the_implementation(tmp_path: Path) -> None:
    model(attn_implementation=FUSED_SINKS).save_pretrained(tmp_path)
    assert FUSED_SINKS not in (tmp_path / "config.json").read_text()
