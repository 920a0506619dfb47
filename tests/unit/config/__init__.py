"""Tests of pipeline.config. They are in a package, so that their conftest.py does not clash with the one in tests/."""
