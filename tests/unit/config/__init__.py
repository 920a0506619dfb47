"""Tests of pipeline.config. A package, so that its conftest and its file names are its own."""
