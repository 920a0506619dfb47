"""One file per stage, each with run(config) -> Artifact. Stages read artifacts; they do not import one another."""
