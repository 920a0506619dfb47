"""Each stage has one file, with a function run(config) -> Artifact.

A stage must not know another stage: it reads artifacts. Libraries that take seconds to import (trl, peft, modelopt) are
imported where the work begins. So the program reports mistakes and "up to date" at once.
"""
