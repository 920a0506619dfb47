"""Describe the data, compute the memory and disk space that the run needs, and find problems.

Each kind of figure has its own file.

This package must not load weights. The tokenizer and the sizes in config.json are enough.
"""

from pipeline.config import PipelineConfig


def find_ahead(settings: PipelineConfig, is_launched_well: bool) -> list[str]:
    """List the mistakes that a later stage would find. The arguments are those of `ahead.problems`."""
    from pipeline.doctor import ahead  # imports torch, so a command that trains nothing does not import it

    return ahead.problems(settings, is_launched_well)
