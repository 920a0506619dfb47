"""Compare the needs of a run with the free memory and disk space, and say what to set so that everything fits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.config import Stage
from pipeline.doctor import remedies
from pipeline.doctor.facts import Facts
from pipeline.doctor.needs import ControlFigures, NeedFigures
from pipeline.errors import UserError
from pipeline.runs import controls
from pipeline.runs.console import warn
from pipeline.runs.disk import distinct_gigabytes, gigabytes
from pipeline.runs.host_memory import training_bytes
from pipeline.runs.run import Run

GPU, HOST, DISK = "on each GPU", "of host memory", "of disk space"
"""Kinds of room that can be too small."""


@dataclass(frozen=True)
class Shortage:
    """Something that needs more room than there is.

    Attributes:
        what: the stage or the control, as the subject of a sentence.
        kind: GPU, HOST or DISK.
        needed, free: bytes.
        is_estimated: whether `needed` is an estimate.
    """

    what: str
    kind: str
    needed: int
    free: int
    is_estimated: bool = False

    def describe(self) -> str:
        """Return a sentence, such as `sft needs 42.3 GB on each GPU, but only 24.0 GB are free.`"""
        about = "about " if self.is_estimated else ""
        needed, free = distinct_gigabytes(self.needed, self.free)
        return f"{self.what} needs {about}{needed} {self.kind}, but only {free} are free."


def findings(facts: Facts) -> list[str]:
    """Return one message that lists all needs that do not fit, and the settings that help. Empty if all fits."""
    found = shortages(facts)
    if not found:
        return []
    return [f"the run does not fit. {' '.join(each.describe() for each in found)} {_remedy(facts)}"]


def raise_if_too_small(facts: Facts) -> None:
    """Stop before the first stage that uses the hardware. With doctor.required=false, only warn.

    Raises:
        UserError: something does not fit.
    """
    report(
        shortages(facts),
        facts.run,
        "If doctor gave no warning of it, less is free than before. Free some, or run stage=doctor: it measures again,"
        " and says what to set.",
    )


def report(found: list[Shortage], run: Run, advice: str) -> None:
    """Raise UserError for these shortages, or warn of them if doctor.required=false. Do nothing if there are none."""
    if not found:
        return
    text = f"the run does not fit. {' '.join(each.describe() for each in found)} {advice}"
    if run.config.doctor.required:
        raise UserError(f"{text} To start anyway, set doctor.required=false.")
    warn(run.stage.name, f"{text} It starts anyway, because doctor.required=false.")


def shortages_of_stage(facts: Facts, stage: str) -> list[Shortage]:
    """Compare the needs of one training stage with the machine."""
    device, is_estimated = device_needed(facts, stage), bool(facts.needs["devices"][stage]["estimated_because"])
    disk = facts.needs["disk_bytes"][stage] + facts.needs["checkpoint_bytes"][stage]
    machine = facts.machine
    together = machine["local_processes"] * training_bytes(device)
    on_host = Shortage(stage, HOST, together, machine["host_free_bytes"], is_estimated=True)
    on_gpu = Shortage(stage, GPU, device, machine["gpu_free_bytes"], is_estimated)
    found = [on_gpu if machine["gpus"] else on_host, Shortage(stage, DISK, disk, machine["disk_free_bytes"])]
    return [each for each in found if each.needed > each.free]


def shortages(facts: Facts) -> list[Shortage]:
    """Compare the needs of the stages that are not complete with the machine."""
    return [*_devices(facts), *_host(facts), *_disk(facts)]


def controls_of(facts: Facts) -> Mapping[str, ControlFigures]:
    """Return the needs of the run's controls, by name."""
    return facts.needs.get("controls", {})


def device_needed(facts: Facts, stage: str) -> int:
    """Return the peak bytes on each device while a stage trains."""
    return facts.needs["devices"][stage]["bytes"]


def disk_needed(facts: Facts, *, from_scratch: bool = False) -> int:
    """Compute the peak disk usage of the remaining stages, in bytes. Only one of them has checkpoints at a time.

    Args:
        facts: the facts.
        from_scratch: count all stages, as in an empty run_dir.
    """
    todo = [name for name in facts.needs["disk_bytes"] if from_scratch or not facts.run.is_complete(Stage[name])]
    made = [] if from_scratch else [name for name in controls_of(facts) if _is_made(facts.run, name)]
    others = [control for name, control in controls_of(facts).items() if name not in made]
    resumable = [size for name, size in facts.needs["checkpoint_bytes"].items() if name in todo]
    resumable += [control["checkpoint_bytes"] for control in others]
    sizes = [*(facts.needs["disk_bytes"][name] for name in todo), *(control["disk_bytes"] for control in others)]
    return sum(sizes) + max(resumable, default=0)


def _is_made(run: Run, control: str) -> bool:
    return any(made.artifact.directory.parent.name == control for made in controls.find_made(run))


def host_needed(facts: Facts) -> int:
    """Compute how much host memory the processes of this machine need together, in bytes.

    The main process loads the whole model to quantize, evaluate and verify it. Training streams the weights to the
    GPUs. Without a GPU, training takes place in host memory, together with all else that `training_bytes` counts.
    """
    whole = largest_model(facts.needs)
    if facts.machine["gpus"]:
        return whole
    training = max((device_needed(facts, stage) for stage in facts.needs["device_bytes"]), default=0)
    training = max(training, *(control["device_bytes"] for control in controls_of(facts).values()), 0)
    return max(whole, facts.machine["local_processes"] * training_bytes(training))


def largest_model(needs: NeedFigures) -> int:
    """Return the bytes of the weights of the largest model that a process loads whole."""
    return max(needed["weights"] for needed in needs["device_bytes"].values())


def _devices(facts: Facts) -> list[Shortage]:
    if not facts.machine["gpus"]:
        return []
    free = facts.machine["gpu_free_bytes"]
    stages = {
        stage: (device_needed(facts, stage), bool(facts.needs["devices"][stage]["estimated_because"]))
        for stage in facts.needs["device_bytes"]
        if not facts.run.is_complete(Stage[stage])
    }
    made = {name: (each["device_bytes"], True) for name, each in controls_of(facts).items()}
    wanted = {**stages, **{f"the control {name}": size for name, size in made.items()}}
    return [Shortage(what, GPU, needed, free, about) for what, (needed, about) in wanted.items() if needed > free]


def _host(facts: Facts) -> list[Shortage]:
    needed, free = host_needed(facts), facts.machine["host_free_bytes"]
    if needed <= free:
        return []
    if facts.machine["gpus"]:
        what = "loading the whole model (quantize, evaluate, verify)"
    elif (control := _largest_control(facts)) is not None:
        what = f"training the control {control} without a GPU"
    else:
        what = "training without a GPU"
    return [Shortage(what, HOST, needed, free, is_estimated=True)]


def _largest_control(facts: Facts) -> str | None:
    """Return the control whose training needs more memory than every stage of the run, or None."""
    name, control = max(controls_of(facts).items(), key=lambda each: each[1]["device_bytes"], default=(None, None))
    stages = max(device_needed(facts, stage) for stage in facts.plan.trainings)
    return name if control is not None and control["device_bytes"] > stages else None


def _disk(facts: Facts) -> list[Shortage]:
    needed, free = disk_needed(facts), facts.machine["disk_free_bytes"]
    what = f"run_dir={facts.run.config.run_dir}"
    return [Shortage(what, DISK, needed, free)] if needed > free else []


def _excess(facts: Facts) -> int:
    return sum(each.needed - each.free for each in shortages(facts))


def _remedy(facts: Facts) -> str:
    """Say what to add to the command so that everything fits. The whole is checked by the same prediction.

    If no settings help, say which hardware the run needs.
    """
    chosen, predicted = _search(facts)
    left = shortages(predicted)
    words = [word for change in chosen for word in change.settings]
    if left and all(each.kind == DISK for each in left):
        needed = gigabytes(disk_needed(predicted, from_scratch=True))
        words.append(f"run_dir=<a directory on a disk with {needed} free>")
        left = []
    if not left:
        return (
            f"To make everything fit, add to the command: {' '.join(words)}. Predicted with it: {_totals(predicted)}."
        )
    return f"No settings known here make everything fit on this machine. It needs {_hardware(facts)}."


def _search(facts: Facts) -> tuple[list[remedies.Change], Facts]:
    """Return changes with which everything fits, and the facts with them. If nothing fits, return all that helped.

    Changes with less effect on the result are tried first, and kept if they save room. First, the needs are estimated.
    The chosen changes are then measured, and more are added if the measurement asks for it. In the end, changes that
    are not needed are removed.
    """
    chosen: list[remedies.Change] = []
    estimated = remedies.predict(facts, [], is_measured=False)
    is_measured = not shortages(estimated)  # the estimate is too low, so each change is measured
    now = facts if is_measured else estimated
    for group in _groups(facts):
        if not shortages(now) and not is_measured:
            now, is_measured = remedies.predict(facts, chosen, is_measured=True), True
        if not shortages(now) or (group.is_costly and all(each.kind == DISK for each in shortages(now))):
            break
        more = [*chosen, *remedies.keep_allowed(facts, chosen, group.changes)]
        tried = remedies.predict(facts, more, is_measured=is_measured)
        if _excess(tried) < _excess(now):
            chosen, now = more, tried
    if shortages(now):
        return chosen, now
    fewer = _without_needless(facts, chosen)
    confirmed = remedies.predict(facts, fewer, is_measured=True)
    if not shortages(confirmed):
        return fewer, confirmed
    return chosen, remedies.predict(facts, chosen, is_measured=True)


class _Group(NamedTuple):
    changes: list[remedies.Change]
    is_costly: bool


def _groups(facts: Facts) -> Iterator[_Group]:
    yield from (_Group(changes, is_costly=False) for changes in remedies.groups(facts) if changes)
    yield from (_Group(changes, is_costly=True) for changes in remedies.costly_groups(facts) if changes)


def _without_needless(facts: Facts, chosen: list[remedies.Change]) -> list[remedies.Change]:
    kept = list(chosen)
    for change in reversed(chosen):
        fewer = [each for each in kept if each is not change]
        if not shortages(remedies.predict(facts, fewer, is_measured=False)):
            kept = fewer
    return kept


def _totals(facts: Facts) -> str:
    parts = []
    if facts.machine["gpus"]:
        sizes = " and ".join(
            f"{stage} {'about ' if facts.needs['devices'][stage]['estimated_because'] else ''}"
            f"{gigabytes(device_needed(facts, stage))}"
            for stage in facts.needs["device_bytes"]
        )
        parts.append(f"{sizes} {GPU}")
    parts += [f"about {gigabytes(host_needed(facts))} {HOST}", f"{gigabytes(disk_needed(facts))} {DISK}"]
    return ", ".join(parts)


def _hardware(facts: Facts) -> str:
    """Name the hardware on which the run fits without other settings."""
    parts = []
    if any(each.kind == GPU for each in shortages(facts)):
        largest = max(each.needed for each in shortages(facts) if each.kind == GPU)
        count = remedies.count_gpus(facts, facts.machine["gpu_free_bytes"])
        several = (
            f" or {count} GPUs of this size (scripts/launch --processes {count} … sharding=fsdp2)" if count else ""
        )
        parts.append(f"a GPU with {gigabytes(largest)} free{several}")
    parts.append(f"about {gigabytes(host_needed(facts))} {HOST}")
    return f"{', '.join(parts)}, and {gigabytes(disk_needed(facts))} {DISK}"
