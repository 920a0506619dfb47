"""Runs the demonstration with several seeds, and writes its results into the README and docs/story.md."""
