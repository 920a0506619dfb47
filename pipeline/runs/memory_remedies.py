"""Find settings that would save memory in a stage. Settings that the run already has are left out."""

from collections.abc import Callable, Iterator

from pipeline.config import (
    DataConfig,
    Device,
    EvaluateConfig,
    Experts,
    Method,
    PipelineConfig,
    QuantizeConfig,
    Sharding,
    Stage,
    TrainConfig,
    can_train_parts,
    first_training,
)
from pipeline.config import memory_savings as savings


def remedies(config: PipelineConfig, on_gpu: bool) -> list[str]:
    """List settings, as `key=value`, that save memory in the stage of `config`.

    Args:
        config: the configuration of the stage.
        on_gpu: True if GPU memory was too small, False if host memory was too small.
    """
    found = _BY_STAGE.get(config.stage)
    return [] if found is None else list(found(config, on_gpu))


def _sft(config: PipelineConfig, on_gpu: bool) -> Iterator[str]:
    yield from _training("sft", config.sft, config, on_gpu)


def _qat(config: PipelineConfig, on_gpu: bool) -> Iterator[str]:
    if config.qat.rounded_cache_gib:
        yield "qat.rounded_cache_gib=0"
    if config.qat.distillation.weight:
        yield "qat.distillation.weight=0"
    yield from _training("qat", config.qat, config, on_gpu)


def _training(name: str, train: TrainConfig, config: PipelineConfig, on_gpu: bool) -> Iterator[str]:
    _, first = first_training(config.quantize.source, config.sft, config.qat)
    if Method.full not in (first.method, train.method) and config.upcast.experts is Experts.bf16:
        yield "upcast.experts=packed (run stage=upcast again with overwrite=true, then the stages after it)"
    for saving in (savings.use_small_batch, savings.reshard_after_forward, savings.checkpoint_gradients):
        if change := saving(train):
            yield " ".join(savings.write_overrides(name, change))
    yield from _shorter(config.data)
    source, experts = config.quantize.source, config.upcast.experts
    if train.method is Method.full and can_train_parts(name, source, experts):
        yield savings.write_group(name, "bf16_parts")
    if train.method is not Method.lora:
        yield savings.write_group(name, "lora")
    if on_gpu and config.sharding in (Sharding.none, Sharding.zero2):
        yield "sharding=fsdp2 (on several GPUs, with scripts/launch)"


def _shorter(data: DataConfig) -> Iterator[str]:
    if data.max_length > savings.SHORTEST:
        yield f"data.max_length={data.max_length // 2}"


def _quantize(quantize: QuantizeConfig, data: DataConfig) -> Iterator[str]:
    if quantize.batch_size > 1:
        yield "quantize.batch_size=1"
    yield from _shorter(data)


def _evaluate(evaluate: EvaluateConfig, data: DataConfig) -> Iterator[str]:
    if evaluate.batch_size > 1:
        yield "evaluate.batch_size=1"
    if evaluate.generate and evaluate.generation.batch_size > 1:
        yield "evaluate.generation.batch_size=1"
    if evaluate.lm_eval.tasks and evaluate.lm_eval.batch_size > 1:
        yield "evaluate.lm_eval.batch_size=1"
    yield from _shorter(data)


def _verify(on_gpu: bool) -> Iterator[str]:
    if on_gpu:
        yield "CUDA_VISIBLE_DEVICES='' (the check then runs on the CPU)"


def _conversion(device: Device, on_gpu: bool) -> Iterator[str]:
    if on_gpu and device is not Device.cpu:
        yield "device=cpu"


_BY_STAGE: dict[Stage, Callable[[PipelineConfig, bool], Iterator[str]]] = {
    Stage.upcast: lambda config, on_gpu: _conversion(config.device, on_gpu),
    Stage.sft: _sft,
    Stage.quantize: lambda config, _: _quantize(config.quantize, config.data),
    Stage.qat: _qat,
    Stage.export: lambda config, on_gpu: _conversion(config.device, on_gpu),
    Stage.verify: lambda _, on_gpu: _verify(on_gpu),
    Stage.evaluate: lambda config, _: _evaluate(config.evaluate, config.data),
}
"""Stage -> function that yields its remedies. The other stages hold no tensors."""
