"""Whether `verify` has passed on the present files of this run's export."""

from pipeline.config import PipelineConfig, Stage
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact
from pipeline.runs.commands import stage_command


def proof_of(config: PipelineConfig, export: Artifact) -> Artifact | None:
    """The artifact of the `verify` that passed on this export, or None. A failed `verify` leaves no artifact."""
    if not artifacts.is_complete(config, Stage.verify):
        return None
    proof = artifacts.load(artifacts.stage_dir(config, Stage.verify.name))
    return proof if proof.parents["checkpoint"] == export.fingerprint else None


def missing_proof(config: PipelineConfig, export: Artifact) -> str:
    """The message for an export without such an artifact."""
    command = stage_command(Stage.verify, run_dir=config.run_dir, recipe=config.recipe)
    return f"{export.directory}: stage=verify has not passed on it. Run first: {command}"
