"""One file per stage, each with run(config) -> Artifact. Stages read artifacts; they do not import one another.

Libraries that take seconds to import (trl, peft, modelopt) are imported where the work begins. Error messages and
"up to date" then appear at once.
"""
