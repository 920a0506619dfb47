"""One file per stage, each with run(config) -> Artifact. Stages read artifacts; they do not import one another.

What takes seconds to import (trl, peft, modelopt) is imported where the work begins, so that mistakes and "up to date"
answer at once.
"""
