"""Tests of pipeline.config. This is a package, so its conftest and file names do not clash with others."""
