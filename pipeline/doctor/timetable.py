"""The estimated time of each stage of a run and its cost, as lines of the report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.checkpoints.config_json import is_quantized
from pipeline.config import EvaluateConfig, Stage
from pipeline.config.controls import controls_of
from pipeline.config.gpus import GPUS, GpuModel, recognize_gpu
from pipeline.doctor import speeds, time
from pipeline.doctor.facts import Facts
from pipeline.doctor.lengths import Amounts, amounts_of
from pipeline.doctor.plan import Plan
from pipeline.doctor.speeds import Speed
from pipeline.doctor.time import Devices, Inference
from pipeline.doctor.work import Work
from pipeline.runs.gpus import Gpu

_ASSUMED = (
    f"assumed: {speeds.COMPUTE_EFFICIENCY:.0%} of the peak arithmetic, {speeds.BANDWIDTH_EFFICIENCY:.0%} of the peak"
    f" bandwidth, {speeds.DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s from disk"
)
_ASSUMED_ON_CPU = f"assumed: its measured speed all the time, {speeds.DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s from disk"


@dataclass(frozen=True)
class Timetable:
    """Estimated seconds of each stage.

    Attributes:
        seconds: seconds by the name of the stage.
        device: the device and the assumptions, in words.
        devices: number of devices that the run holds.
        price: price of a device for one hour, or None.
        missing: what the estimate leaves out, or "".
    """

    seconds: Mapping[str, float]
    device: str
    devices: int
    price: float | None = None
    missing: str = ""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def cost(self) -> float | None:
        """Price of all devices for all stages, or None without a price."""
        return None if self.price is None else self.price * self.devices * self.total / 3600

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield titles and values for the report."""
        yield "time", f"estimate without start-up. No GPU run has been compared with it. {self.device}"
        for name, seconds in self.seconds.items():
            yield f"  {name}", duration(seconds)
        several = f" on {self.devices} GPUs" if self.devices > 1 else ""
        yield "  together", f"{duration(self.total)}{several}{self.missing}"
        if self.cost is not None:
            hours = self.devices * self.total / 3600
            yield "cost", f"estimate: {self.cost:.2f} for {hours:.1f} GPU hours at {self.price:g} each"


def duration(seconds: float) -> str:
    """Format seconds as `3 h 20 min`, or `under a minute`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return "under a minute"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def of_run(facts: Facts, speed: Speed, prompts: int) -> Timetable:
    """Estimate all stages of a run, also those that are complete.

    Args:
        facts: figures of the data and needs of the run.
        speed: speed of each device.
        prompts: number of prompts that models answer in `evaluate`.
    """
    config, devices = facts.run.config, Devices(facts.machine["processes"], speed.capability)
    amounts = amounts_of(facts.data, prompts)
    asked = Inference(config.evaluate, config.verify.samples, config.model.dtype)
    done = time.of_stages(facts.plan, asked, facts.model, amounts, needed=facts.needs, devices=devices)
    if config.controls:
        done["controls"] = _controls(facts, amounts, devices)
    return Timetable(
        {name: speed.seconds(each) for name, each in done.items()},
        speed.name,
        devices.count,
        config.doctor.price_per_gpu_hour,
        _missing(config.evaluate),
    )


def speed_of(planned: str | None, visible: tuple[Gpu, ...]) -> Speed | None:
    """Return the speed of the planned GPU, of the first visible one, or of the CPU. None if a GPU is not in GPUS.

    Args:
        planned: value of `doctor.gpu`, or None.
        visible: the GPUs of this machine.
    """
    if planned is None and not visible:
        cpu = Speed.of_cpu()
        return replace(cpu, name=f"{cpu.name} (measured here: {_rates(cpu)}; {_ASSUMED_ON_CPU})")
    found = GPUS[planned] if planned is not None else recognize_gpu(visible[0].name)
    if found is None:
        return None
    return Speed.of_gpu(found, f"{planned or visible[0].name} (peak {_rates(found)}; {_ASSUMED})")


def _rates(device: GpuModel | Speed) -> str:
    bf16, fp32 = (
        f"{flops / 1e12:.3g} TFLOP/s in {name}" for flops, name in ((device.flops, "BF16"), (device.fp32_flops, "FP32"))
    )
    return f"{bf16}, {fp32}, {device.bytes_per_second / 1e12:.3g} TB/s"


def unknown_gpu(name: str) -> str:
    """Say that there is no estimate for a GPU."""
    return f"no estimate: the speed of {name} is unknown here. Set doctor.gpu to the most similar of {', '.join(GPUS)}"


def _missing(evaluate: EvaluateConfig) -> str:
    parts = ["lm_eval tasks"] if evaluate.lm_eval.tasks else []
    parts += ["models on servers"] if evaluate.endpoint.url is not None else []
    return f", without {' and '.join(parts)}" if parts else ""


def _controls(facts: Facts, amounts: Amounts, devices: Devices) -> Work:
    config, total = facts.run.config, Work()
    is_mxfp4 = is_quantized(facts.model)
    has_mxfp4 = is_mxfp4 or facts.plan.starts_packed(is_mxfp4=is_mxfp4)
    for control in controls_of(config, "sft", has_mxfp4=has_mxfp4):
        plan = Plan.of(control.config)
        if Stage.sft in control.stages:
            total += time.training(plan, Stage.sft.name, facts.model, amounts, devices)
        if Stage.quantize in control.stages:
            total += time.rounding(plan, facts.model, amounts, facts.needs, devices)
    return total
