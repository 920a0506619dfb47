"""Machines and launchers that do not fit the command are found before a stage begins."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_program

from pipeline.config import (
    Device,
    Method,
    PipelineConfig,
    Precision,
    QuantizeSource,
    Stage,
    TrackingBackend,
    TrainConfig,
)
from pipeline.doctor.fake_gpu import FakeProperties, pretend_cuda
from pipeline.errors import MachineError, UserError
from pipeline.runs import preflight
from pipeline.runs.gpus import Gpu
from pipeline.runs.preflight import Machine

H100 = Gpu("H100", (9, 0), 85 * 10**9)
T4 = Gpu("T4", (7, 5), 16 * 10**9)
LORA = TrainConfig(method=Method.lora, precision=Precision.bf16)
TRAINING = (Stage.sft, Stage.qat, Stage.controls, Stage.all)
OTHERS = tuple(stage for stage in Stage if stage not in TRAINING)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def found(machine: Machine, stage: Stage = Stage.sft, **settings: object) -> list[str]:
    return preflight.problems(replace(PipelineConfig(stage=stage), **settings), machine)


@pytest.mark.parametrize("stage", TRAINING)
def test_training_on_several_gpus_without_a_launcher_is_refused(stage: Stage) -> None:
    (message,) = found(Machine((H100, H100)), stage)
    assert message.startswith("2 GPUs are visible, but there is one process")
    assert "scripts/launch" in message and "CUDA_VISIBLE_DEVICES=0" in message


@pytest.mark.parametrize("stage", OTHERS)
def test_stages_that_do_not_train_need_no_launcher(stage: Stage) -> None:
    assert found(Machine((H100, H100)), stage) == []


@pytest.mark.parametrize(
    "machine",
    [
        Machine(),
        Machine((H100,)),
        Machine((H100, H100), local_processes=2, has_launcher=True),
        Machine((H100, H100), local_processes=1, has_launcher=True),
        Machine((), local_processes=4, has_launcher=True),
    ],
)
def test_at_most_one_process_per_gpu_is_right_and_so_is_a_cpu(machine: Machine) -> None:
    assert found(machine, Stage.all) == []


@pytest.mark.parametrize("stage", [Stage.all, Stage.evaluate])
def test_more_processes_than_gpus_are_refused(stage: Stage) -> None:
    (message,) = found(Machine((H100, H100), local_processes=8, has_launcher=True), stage)
    assert message.startswith("8 processes were started on this machine, but 2 GPUs are visible.")
    assert "--processes 2" in message


def test_processes_of_other_machines_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pretend_cuda(8):
        assert Machine.read().local_processes == 8
        preflight.check(PipelineConfig(stage=Stage.sft))


def test_the_facts_are_those_of_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda(2, FakeProperties("old", 7, 5, 10**10)):
        machine = Machine.read()
    assert machine.gpus == (Gpu("old", (7, 5), 10**10),) * 2
    assert (machine.local_processes, machine.has_launcher) == (1, False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Machine.read().has_launcher


@pytest.mark.parametrize("stage", list(Stage))
def test_a_gpu_that_is_not_there_is_refused_in_every_stage(stage: Stage) -> None:
    (message,) = found(Machine(architectures=("sm_90",)), stage, device=Device.cuda)
    assert message == preflight.NO_GPU
    (message,) = found(Machine(torch="2.13.0+cpu"), stage, device=Device.cuda)
    assert message == f"{preflight.NO_GPU} (torch 2.13.0+cpu is built without CUDA.)"
    assert found(Machine(), stage, device=Device.auto) == []


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.mixed_bf16])
def test_bf16_training_on_a_gpu_that_has_no_bf16_is_refused(precision: Precision) -> None:
    train = TrainConfig(precision=precision)
    (message,) = found(Machine((T4,)), sft=train)
    assert message.startswith(f"sft.precision={precision.name}: T4 (compute capability 7.5) has no BF16 arithmetic")
    assert "sft.precision=fp32" in message
    assert found(Machine((T4,)), sft=TrainConfig(precision=Precision.fp32)) == []
    assert found(Machine((Gpu("A100", (8, 0), 1),)), sft=train) == []


def test_both_training_stages_of_all_are_checked_except_one_that_is_skipped() -> None:
    assert [message.partition(".")[0] for message in found(Machine((T4,)), Stage.all)] == ["sft", "qat"]
    only_qat = replace(PipelineConfig().quantize, source=QuantizeSource.upcast)
    assert [message.partition(".")[0] for message in found(Machine((T4,)), Stage.all, quantize=only_qat)] == ["qat"]


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend no"),
        ("ACCELERATE_USE_CPU", "True", "--cpu"),
    ],
)
def test_a_launcher_that_contradicts_the_configuration_is_refused(variable: str, value: str, part: str) -> None:
    machine = Machine((H100,), has_launcher=True, environment={variable: value})
    (message,) = found(machine, sft=LORA)
    assert part in message
    assert found(machine, Stage.export) == []


def test_what_accelerate_sets_by_default_contradicts_nothing() -> None:
    defaults = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_CPU": "False",
    }
    assert found(Machine((H100,), has_launcher=True, environment=defaults), sft=LORA) == []
    same = {**defaults, "ACCELERATE_MIXED_PRECISION": "bf16"}
    mixed = TrainConfig(precision=Precision.mixed_bf16)
    assert found(Machine((H100,), has_launcher=True, environment=same), sft=mixed) == []


@pytest.mark.parametrize(
    ("architectures", "capability", "is_supported"),
    [
        (("sm_80", "sm_90"), (9, 0), True),
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (7, 0), False),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "compute_90"), (10, 0), True),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),
        (("sm_120",), (12, 1), True),
    ],
)
def test_torch_needs_kernels_for_the_gpu(
    architectures: tuple[str, ...], capability: tuple[int, int], is_supported: bool
) -> None:
    machine = Machine((Gpu("this one", capability, 1),), architectures=architectures, torch="2.13")
    if is_supported:
        preflight.raise_if_no_kernels(machine)
    else:
        with pytest.raises(MachineError, match=f"torch 2.13 has no kernels for this one .*{architectures[0]}"):
            preflight.raise_if_no_kernels(machine)


def test_several_processes_on_gpus_of_different_sizes_are_warned() -> None:
    almost = replace(H100, total_bytes=H100.total_bytes + 10**9)
    assert preflight.unequal_sizes(Machine((H100, almost), local_processes=2)) is None
    assert preflight.unequal_sizes(Machine((H100, T4), local_processes=1)) is None
    assert "16 to 85 GB" in str(preflight.unequal_sizes(Machine((H100, T4), local_processes=2)))


def test_the_program_refuses_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pretend_cuda(8):
        assert run_program("stage=all", "recipe=smoke", f"run_dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 8 GPUs are visible") and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_all_stages_are_refused_at_once_if_training_cannot_be_sharded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=all", "recipe=smoke", "sharding=fsdp2", f"run_dir={tmp_path / 'run'}") == 2
    assert "error: sharding=fsdp2: needs several processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_mistakes_are_reported_together() -> None:
    with pretend_cuda(2, FakeProperties("old", 7, 5)), pytest.raises(UserError) as raised:
        preflight.check(PipelineConfig(stage=Stage.sft))
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize(
    ("backend", "module"),
    [
        (TrackingBackend.wandb, "wandb"),
        (TrackingBackend.tensorboard, "tensorboard"),
        (TrackingBackend.mlflow, "alembic"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: TrackingBackend,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run_program("stage=upcast", "recipe=smoke", f"tracking={backend.name}", f"run_dir={tmp_path}") == 2
    assert (
        f"error: tracking={backend.name}: the package {module} is not installed."
        f" Use pip install 'gpt-oss-qat[{backend.name}]', or tracking=none."
    ) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
