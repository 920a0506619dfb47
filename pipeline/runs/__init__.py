"""A run directory: artifacts, provenance, console, metrics and tracking.

It must not know models or data sets. For this package, a stage is a name, some settings and some files.
"""
