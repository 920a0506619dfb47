"""Find damage of complete stages: compare their files with the digests that artifact.json holds.

A disk or a memory module can change a bit of a file without an error. The size then stays the same.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.config import Stage
from pipeline.errors import CheckFailed, at_most
from pipeline.runs.artifacts import ARTIFACT_FILE, RECORDS, Artifact, advise_rebuild, digest_of, load
from pipeline.runs.console import progress, say, warn
from pipeline.runs.json_files import CHECKSUM, read_record

_LINKING = (Stage.upcast.name, Stage.quantize.name)
"""Stages that may link files of their input, so that both have the same damage."""


def raise_if_damaged(artifacts: Iterable[Artifact], stage: str) -> None:
    """Read the files of artifacts, and of the checkpoints below adapters, and compare their digests.

    Args:
        artifacts: the inputs of a stage.
        stage: name of the stage that needs them, for messages.

    Raises:
        CheckFailed: files have changed. One message names all of them.
    """
    found = with_bases(artifacts)
    problems = [problem for artifact in found for problem in find_damage(artifact, stage=stage)]
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems:\n  - "
        raise CheckFailed(count + "\n  - ".join(at_most(problems)))
    names = ", ".join(str(artifact.directory) for artifact in found)
    if names:
        say(stage, f"artifacts.check=full: every file has its recorded digest: {names}")


def with_bases(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """List artifacts, each once, and the artifacts of the full checkpoints below their adapters."""
    found: dict[Path, Artifact] = {}
    waiting = list(artifacts)
    while waiting:
        artifact = waiting.pop(0)
        if artifact.directory in found:
            continue
        found[artifact.directory] = artifact
        base = artifact.base_directory
        homes = [
            each for each in (base, base.parent) if base != artifact.directory and (each / ARTIFACT_FILE).is_file()
        ]
        waiting += [load(home) for home in homes[:1]]
    return list(found.values())


def find_damage(artifact: Artifact, known: Mapping[str, str] | None = None, *, stage: str) -> list[str]:
    """Describe each file of an artifact that differs from its digest. Missing files of the payload are described too.

    Args:
        artifact: the artifact.
        known: digests of files that were read already, keyed by the file's name.
        stage: name of the stage that checks, for messages.
    """
    problems = [] if (damage := _damage_of_record(artifact)) is None else [damage]
    if not artifact.digests:
        warn(
            stage,
            f"{artifact.directory / ARTIFACT_FILE}: an older version of this program wrote it, without digests. Only"
            f" the sizes of its files are checked. To get digests, run stage={artifact.stage} with overwrite=true.",
        )
        return problems
    paths = {name: artifact.directory / name for name in artifact.digests}
    there = {name: path for name, path in paths.items() if path.is_file()}
    have = {name: digest for name, digest in (known or {}).items() if name in there}
    with progress(
        total=sum(there[name].stat().st_size for name in there.keys() - have), what="digests", unit="B"
    ) as bar:
        have |= {name: digest_of(there[name], bar.update) for name in there if name not in have}
    for name, digest in artifact.digests.items():
        if name not in there and name not in RECORDS:
            problems.append(f"{paths[name]}: missing. {_remedy(artifact)}")
        elif name in there and have[name] != digest:
            problems.append(
                f"{paths[name]}: changed since stage={artifact.stage} wrote it: its XXH3-128 was {digest}, and is"
                f" {have[name]}. {_remedy(artifact)}"
            )
    return problems


def _damage_of_record(artifact: Artifact) -> str | None:
    """Describe the damage of artifact.json itself, or return None."""
    path = artifact.directory / ARTIFACT_FILE
    try:
        read_record(path)
    except (OSError, ValueError) as error:
        return f"{path}: changed since stage={artifact.stage} wrote it ({CHECKSUM}: {error}). {_remedy(artifact)}"
    return None


def _remedy(artifact: Artifact) -> str:
    source = ""
    if artifact.stage in _LINKING:
        source = " The file may be a link to a file of its input, so check or fetch that file first."
    advice = advise_rebuild(artifact.directory)
    return f"If nobody has edited the file, the disk or the memory is failing: check them.{source} {advice}"
