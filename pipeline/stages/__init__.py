"""Each stage has one file, with a function run(config) -> Artifact.

A stage must not know another stage: it reads artifacts. Libraries that take seconds to import (trl, peft, modelopt) are
imported where the work begins. So the program reports mistakes and "up to date" at once.
"""

from pipeline.config import PipelineConfig, Stage


def find_ahead(config: PipelineConfig, is_launched_well: bool) -> list[str]:
    """Return the mistakes that later stages of a command would find. Arguments are those of `ahead.problems`."""
    from pipeline.doctor import ahead
    from pipeline.publish import hub

    found = ahead.problems(config, is_launched_well=is_launched_well)
    return found + hub.problems(config.export) if config.stage is Stage.all else found
