"""Faults while a stage runs: a sample of those that scripts/soak judges. Nothing is lost, and the injector sees all.

FAULTS_SEED=<seed> draws another sample. A failed test names its seed. scripts/soak judges all faults.
"""

import os
import random
from itertools import cycle

import disk
import pytest
from injector import COMPILER, Change, Injector, Kind
from judging import IS_WORK, Bench, Fault, Outcome, faults_of
from scenarios import SCENARIOS, Scenario

from pipeline.config import ExportTarget, Stage
from pipeline.runs.metrics import read_metrics

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs Linux on x86-64 and a C compiler")

SEED = int(os.environ.get("FAULTS_SEED", "0"))
NO_RESULT = {Stage.all, Stage.controls, Stage.serve}
"""Stages that have no result of their own: they run other stages, or a server."""
DISTURBED = [stage.name for stage in Stage if stage not in NO_RESULT]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("faults")
    return Bench(directory / "bench", directory / "bases")


def test_every_stage_and_every_export_target_is_disturbed() -> None:
    scenarios = SCENARIOS.values()
    assert {scenario.stage for scenario in scenarios} == set(DISTURBED)
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
    bench.changes(scenario)
    tree = bench.injector.tree()
    for names_kept in (True, False):
        disk.write_tree(tree, bench.injector.run_dir, names_kept)
        assert bench.differences(scenario, IS_WORK) is None


def test_a_complete_checkpoint_survives_a_power_cut(bench: Bench) -> None:
    scenario = SCENARIOS["sft full"]
    changes = bench.known_changes(scenario)
    marked = next(index for index, change in enumerate(changes) if change.path.endswith("checkpoint-2/whole.tmp"))
    following = next(change for change in changes[marked:] if change.path.startswith("sft/metrics.jsonl"))
    bench.start(scenario)
    assert bench.injector.run(scenario.arguments, Kind.forgetful_cut, following.number).was_disturbed
    sft = bench.injector.run_dir / "sft"
    assert (sft / "checkpoints/checkpoint-2/whole").is_file()
    assert [line["step"] for line in read_metrics(sft) if "eval_loss" in line] == [0, 2]


def test_a_fault_that_damages_the_result_is_judged_as_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS["upcast"]
    last = Fault("upcast", Kind.kill, bench.known_changes(scenario)[-1])
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
    """Each stage is disturbed once, in one of its scenarios. The kinds of faults take turns."""
    sampled, verdicts = random.Random(SEED), []
    kinds = cycle(sampled.sample(list(Kind), len(Kind)))
    for stage in DISTURBED:
        scenario = sampled.choice([each for each in SCENARIOS.values() if (each.stage, each.processes) == (stage, 1)])
        kind = next(kinds)
        fault = sampled.choice([each for each in _known_faults(bench, scenario) if each.kind is kind])
        verdicts.append((fault, bench.judge(scenario, fault)))
    wrong = [
        f"{fault.name} ({fault.change.operation} {fault.change.path}): {verdict.outcome.value} {verdict.why}"
        for fault, verdict in verdicts
        if verdict.outcome in (Outcome.lost, Outcome.missed)
    ]
    assert not wrong, f"FAULTS_SEED={SEED}\n" + "\n".join(wrong)
    assert {fault.kind for fault, _ in verdicts} == set(Kind)


def _known_faults(bench: Bench, scenario: Scenario) -> list[Fault]:
    return faults_of(scenario, bench.known_changes(scenario))


@pytest.mark.parametrize("name", ["sft none, rank 0 of 2", "sft fsdp2, rank 1 of 2"])
def test_a_fault_of_one_of_two_processes_loses_nothing(name: str, bench: Bench) -> None:
    scenario = SCENARIOS[name]
    fault = random.Random(SEED).choice(_known_faults(bench, scenario))
    verdict = bench.judge(scenario, fault)
    assert verdict.outcome is not Outcome.lost, f"FAULTS_SEED={SEED}: {fault.name}: {verdict.why}"


def test_the_faults_are_at_least_300(bench: Bench) -> None:
    assert sum(len(_known_faults(bench, SCENARIOS[name])) for name in ("upcast", "export mxfp4 full")) >= 300
