"""The functions for programs and notebooks: run stages, and read, export and verify checkpoints by their paths.

This package must not exit, handle signals or read the command line. `pipeline/__init__.py` lists the public names.
"""
