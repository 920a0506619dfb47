"""Tests of pipeline.config. This is a package, so its conftest does not clash with another directory's."""
