"""Whether `verify` has passed on the export of this run, on exactly the files that are there."""

from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact
from pipeline.config import PipelineConfig, Stage


def proof_of(config: PipelineConfig, export: Artifact) -> Artifact | None:
    """What `verify` left when it passed on this export, or None. It leaves nothing where it found something wrong."""
    if not artifacts.is_complete(config, Stage.verify):
        return None
    proof = artifacts.load(artifacts.stage_dir(config, Stage.verify.name))
    return proof if proof.parents["checkpoint"] == export.fingerprint else None


def missing_proof(config: PipelineConfig, export: Artifact) -> str:
    """The message where there is none."""
    recipe = "" if config.recipe == PipelineConfig.recipe else f" recipe={config.recipe}"
    return (
        f"{export.directory}: stage=verify has not passed on it."
        f" Run first: python -m pipeline stage=verify{recipe} run_dir={config.run_dir}"
    )
