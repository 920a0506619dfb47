"""The counted FLOPs and bytes agree with expected values that are computed by hand."""

from dataclasses import replace
from typing import Any

import pytest
from sizes import ACTIVE, CHOSEN, EXPERT, EXPERTS, FULL, HEAD, LORA, MODEL, PROJECTIONS, SMALL
from test_needs import RELEASED_CONFIG

from pipeline.config import Method, Precision, TrainConfig
from pipeline.doctor import work
from pipeline.doctor.work import Batch, Model, Work
from pipeline.models.attention import EAGER

TOKENS = 40
LONG = Batch(TOKENS, 0)  # without scores
READ = EXPERTS * (1 - (1 - 2 / 4) ** TOKENS)  # expert values that 40 tokens choose
SLIDING = Model.of({**SMALL, "layer_types": ["sliding_attention"], "sliding_window": 5}, "")


def training_pass(train: TrainConfig, batch: Batch = LONG, **more: Any) -> Work:
    usual = {"is_packed": False, "rounds": False, "has_teacher": False}
    return work.training_pass(MODEL, train, batch, **{**usual, **more})


def test_the_released_models_have_the_active_parameters_of_their_model_card() -> None:
    """The card of gpt-oss-20b says 3.6 B, and the card of gpt-oss-120b says 5.1 B."""
    large = {**RELEASED_CONFIG, "num_hidden_layers": 36, "num_local_experts": 128}
    models = [Model.of({**config, "num_experts_per_tok": 4}, "") for config in (RELEASED_CONFIG, large)]
    assert [round(model.active_values / 1e9, 1) for model in models] == [3.6, 5.1]


def test_a_forward_pass_has_two_flops_per_active_value_and_reads_each_weight_once() -> None:
    done = work.forward(MODEL, LONG, width=2, is_packed=False)
    assert done == Work(flops=TOKENS * 2 * ACTIVE, memory_bytes=2 * (PROJECTIONS + HEAD) + 2 * READ)


def test_logits_are_computed_only_for_predicted_tokens() -> None:
    done = work.forward(MODEL, replace(LONG, predicted=0.25), width=2, is_packed=False)
    assert done.flops == TOKENS * 2 * (PROJECTIONS + CHOSEN) + TOKENS * 2 * HEAD / 4


def test_fp32_products_are_counted_apart() -> None:
    full = replace(FULL, precision=Precision.fp32)
    assert training_pass(full).flops == 0 and training_pass(full).fp32_flops == training_pass(FULL).flops
    assert work.forward(MODEL, LONG, width=4, is_packed=False) == Work(
        fp32_flops=TOKENS * 2 * ACTIVE, memory_bytes=4 * (PROJECTIONS + HEAD + READ)
    )


def test_a_kernel_skips_keys_that_a_query_does_not_see_and_eager_attention_does_not() -> None:
    assert MODEL.visible(20, "fused_sinks") == 20 / 2 and MODEL.visible(20, EAGER) == 20
    assert SLIDING.visible(20, "fused_sinks") == 5 - 25 / 40 and SLIDING.visible(20, EAGER) == 20
    assert SLIDING.visible(4, "fused_sinks") == 4 / 2
    assert MODEL.scores(20) == 4 * 2 * 2 * 20


def test_the_backward_pass_of_attention_takes_five_products_or_four_for_two() -> None:
    fused, eager = (replace(LONG, length=20, kernel=kernel) for kernel in ("fused_sinks", EAGER))
    without = training_pass(FULL).flops
    assert training_pass(FULL, fused).flops - without == TOKENS * 4 * 2 * 2 * 10 * (1 + 2.5)
    assert training_pass(FULL, eager).flops - without == TOKENS * 4 * 2 * 2 * 20 * (1 + 2)
    scores = 2 * TOKENS * 20  # heads, queries, keys
    assert training_pass(FULL, eager).memory_bytes - training_pass(FULL).memory_bytes == 2 * 13 * scores * 2


def test_full_training_takes_three_forward_passes_and_checkpointing_one_more() -> None:
    once = PROJECTIONS + CHOSEN
    assert training_pass(FULL).flops == TOKENS * 2 * (3 * once + 4 * HEAD)  # logits are computed twice
    again = training_pass(replace(FULL, gradient_checkpointing=True))
    assert again.flops == TOKENS * 2 * (4 * once + 4 * HEAD)
    assert again.memory_bytes == 3 * 2 * (PROJECTIONS + READ) + 3 * 2 * HEAD


@pytest.mark.parametrize("checkpointing", [True, False])
def test_packed_experts_are_decoded_twice_and_checkpointing_does_not_repeat_them(checkpointing: bool) -> None:
    train = replace(FULL, method=Method.bf16_parts, gradient_checkpointing=checkpointing)
    done, passes = training_pass(train, is_packed=True), 3 if checkpointing else 2
    assert done.flops == pytest.approx(TOKENS * 2 * ((passes + 1) * PROJECTIONS + 4 * HEAD + 8 / 3 * CHOSEN))
    experts = EXPERTS * (2 * (17 / 32 + 2 + 2) + 2 * 2 / 3)  # the backward pass reads decoded gate-up twice
    assert done.memory_bytes == pytest.approx(passes * 2 * PROJECTIONS + 3 * 2 * HEAD + experts)


def test_adapters_have_no_weight_gradients_of_the_base() -> None:
    adapter = 2 * 3 * (4 + 16 + 8 + 4)  # two experts, rank 3, (in + out) of gate_up and of down
    assert work.adapter_values(MODEL, LORA) == adapter
    assert training_pass(LORA).flops == TOKENS * 2 * (2 * (PROJECTIONS + CHOSEN) + 3 * HEAD + 3 * adapter)


def test_casts_of_mixed_precision_read_four_bytes_and_write_two() -> None:
    mixed = training_pass(replace(FULL, precision=Precision.mixed_bf16))
    assert mixed.memory_bytes - training_pass(FULL).memory_bytes == 6 * (PROJECTIONS + HEAD + EXPERTS)


def test_qat_rounds_the_changing_experts_and_the_teacher_runs_forward() -> None:
    plain = training_pass(FULL)
    assert training_pass(FULL, rounds=True).memory_bytes - plain.memory_bytes == 2 * 2 * EXPERTS
    assert training_pass(FULL, has_teacher=True).flops - plain.flops == TOKENS * 2 * ACTIVE
    assert training_pass(LORA, rounds=True).flops - training_pass(LORA).flops == 2 * 3 * EXPERTS


def test_sharding_divides_the_update_but_not_the_gradients_of_the_passes() -> None:
    alone = work.optimizer_step(gradient_bytes=10, state_bytes=20, passes=2, shards=1)
    assert alone.memory_bytes == 2 * 4 * 10 + 3 * 10 + 2 * 20
    assert work.optimizer_step(gradient_bytes=10, state_bytes=20, passes=2, shards=5).memory_bytes == 80 + 70 / 5


def test_a_step_of_generation_reads_the_experts_that_its_tokens_choose() -> None:
    """One token chooses 2 of 4 experts, two tokens choose 3 on average. Packed rows are decoded for each token."""
    assert [MODEL.experts_read(tokens, is_packed=False) / EXPERT for tokens in (1, 2)] == [2, 3]
    assert [MODEL.experts_read(tokens, is_packed=True) / EXPERT for tokens in (1, 2, 9)] == [2, 4, 4]


def test_generation_reads_the_weights_and_the_cache_at_each_step() -> None:
    prompt = Batch(tokens=10, length=5, predicted=0.1)
    done = work.generation(MODEL, 6, batch_size=2, new_tokens=4, prompt=prompt, width=2, is_packed=False)
    keys = 5 + 4 / 2
    cache = 2 * keys * 2 * 1 * 2 * (3 + 2 * 2 / 1)  # two answers, keys and values, copies for two query heads
    steps = Work(
        flops=2 * (2 * ACTIVE + 4 * 2 * 2 * keys), memory_bytes=2 * (PROJECTIONS + HEAD) + 2 * 3 * EXPERT + 2 * cache
    ).times(3 * 4)
    assert done == steps + work.forward(MODEL, prompt, width=2, is_packed=False).times(3)


def test_gptq_is_counted_in_fp32() -> None:
    hessians, inverses = 7 * 2 * 2 * (4**2 + 8**2), 4 * 2 * (4**3 + 8**3)
    updates = 4 * (2 * 8 * 4**2 + 4 * 8**2)
    assert work.gptq(MODEL, 7) == Work(fp32_flops=hessians + inverses + updates)
