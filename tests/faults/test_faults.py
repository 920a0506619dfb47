"""Faults while a stage runs: a sample of those that scripts/soak judges. Nothing is lost, and the injector sees all.

FAULTS_SEED=<seed> draws another sample. A failed test names its seed. scripts/soak judges all faults.
"""

import os
import random
import time

import disk
import pytest
from injector import COMPILER, Change, Injector, Kind
from judging import IS_WORK, Bench, Fault, Outcome, faults_of
from scenarios import SCENARIOS, Scenario

from pipeline.config import ExportTarget, Stage
from pipeline.runs.metrics import read_metrics

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs Linux on x86-64 and a C compiler")

SEED = int(os.environ.get("FAULTS_SEED", "0"))
SECONDS = 60
"""Time for the sample of faults. Preparation takes about 20 s more."""
SINGLE = [name for name, scenario in SCENARIOS.items() if scenario.processes == 1]
NO_RESULT = {Stage.all, Stage.controls, Stage.serve}
"""Stages that have no result of their own: they run other stages, or a server."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("faults")
    return Bench(directory / "bench", directory / "bases")


def test_every_stage_and_every_export_target_is_disturbed() -> None:
    scenarios = SCENARIOS.values()
    assert {scenario.stage for scenario in scenarios} == {stage.name for stage in Stage if stage not in NO_RESULT}
    targets = {scenario.name.split()[1] for scenario in scenarios if scenario.stage == "export"} - {"overwrite"}
    assert targets == {target.name for target in ExportTarget}


@pytest.mark.parametrize("name", ["upcast", "sft full", "export gguf full"])
def test_the_journal_explains_every_file_of_an_undisturbed_run(name: str, bench: Bench) -> None:
    """Otherwise, the injector would miss changes, for example by a writer that bypasses the C library."""
    changes = bench.changes(SCENARIOS[name])
    run_dir, names = bench.injector.run_dir, disk.names_of(bench.injector.tree())
    assert set(names) == {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")}
    new = {path: entry for path, entry in names.items() if isinstance(entry, disk.File)}
    before = bench.injector.work / "before"
    unseen = [
        path
        for path, entry in new.items()
        if not (before / path).exists() and max(entry.written, _linked_size(entry)) < (run_dir / path).stat().st_size
    ]
    assert not unseen
    assert len(faults_of(SCENARIOS[name], changes)) > 100


def _linked_size(entry: disk.File) -> int:
    return entry.synced.stat().st_size if entry.synced is not None else 0


@pytest.mark.parametrize("name", ["upcast", "export mxfp4 full"])
def test_a_complete_stage_and_its_source_survive_a_power_cut_right_after_the_command(name: str, bench: Bench) -> None:
    scenario = SCENARIOS[name]
    for names_kept in (True, False):
        bench.changes(scenario)
        disk.write_tree(bench.injector.tree(), bench.injector.run_dir, names_kept)
        assert bench.differences(scenario, IS_WORK) is None


def test_a_complete_checkpoint_survives_a_power_cut(bench: Bench) -> None:
    scenario = SCENARIOS["sft full"]
    changes = bench.changes(scenario)
    marked = next(index for index, change in enumerate(changes) if change.path.endswith("checkpoint-2/whole.tmp"))
    following = next(change for change in changes[marked:] if change.path.startswith("sft/metrics.jsonl"))
    bench.start(scenario)
    assert bench.injector.run(scenario.arguments, Kind.forgetful_cut, following.number).was_disturbed
    sft = bench.injector.run_dir / "sft"
    assert (sft / "checkpoints/checkpoint-2/whole").is_file()
    assert [line["step"] for line in read_metrics(sft) if "eval_loss" in line] == [0, 2]


def test_a_fault_that_damages_the_result_is_judged_as_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS["upcast"]
    changes = bench.changes(scenario)
    last = Fault("upcast", Kind.kill, changes[-1])
    assert bench.judge(scenario, last).outcome is Outcome.identical
    run = Injector.run

    def damage(injector: Injector, *arguments, **settings):
        ended = run(injector, *arguments, **settings)
        config = injector.run_dir / "upcast" / "config.json"
        config.write_bytes(config.read_bytes() + b" {}")
        return ended

    monkeypatch.setattr(Injector, "run", damage)
    assert bench.judge(scenario, last).outcome is Outcome.lost


def test_a_fault_that_does_not_happen_is_no_success(bench: Bench) -> None:
    beyond = Fault("upcast", Kind.kill, Change(10**6, "write", "upcast/config.json"))
    assert bench.judge(SCENARIOS["upcast"], beyond).outcome is Outcome.missed


def test_sampled_faults_lose_nothing(bench: Bench) -> None:
    """The stages are disturbed in turn, in random order, for a limited time."""
    sampled, lost, judged, end = random.Random(SEED), [], 0, time.monotonic() + SECONDS
    names = sampled.sample(SINGLE, len(SINGLE))
    while names and time.monotonic() < end:
        scenario = SCENARIOS[names[judged % len(names)]]
        fault = sampled.choice(_known_faults(bench, scenario))
        verdict = bench.judge(scenario, fault)
        judged += verdict.outcome is not Outcome.missed
        if verdict.outcome is Outcome.lost:
            lost.append(f"{fault.name} ({fault.change.operation} {fault.change.path}): {verdict.why}")
    assert not lost, f"FAULTS_SEED={SEED}\n" + "\n".join(lost)
    print(f"{judged} faults judged")
    assert judged >= 10


_FAULTS: dict[str, list[Fault]] = {}


def _known_faults(bench: Bench, scenario: Scenario) -> list[Fault]:
    if scenario.name not in _FAULTS:
        _FAULTS[scenario.name] = faults_of(scenario, bench.changes(scenario))
    return _FAULTS[scenario.name]


@pytest.mark.parametrize("name", ["sft none, rank 0 of 2", "sft fsdp2, rank 1 of 2"])
def test_a_fault_of_one_of_two_processes_loses_nothing(name: str, bench: Bench) -> None:
    scenario = SCENARIOS[name]
    fault = random.Random(SEED).choice(faults_of(scenario, bench.changes(scenario)))
    verdict = bench.judge(scenario, fault)
    assert verdict.outcome is not Outcome.lost, f"FAULTS_SEED={SEED}: {fault.name}: {verdict.why}"


def test_the_faults_are_at_least_300(bench: Bench) -> None:
    assert sum(len(_known_faults(bench, SCENARIOS[name])) for name in ("upcast", "export mxfp4 full")) >= 300
