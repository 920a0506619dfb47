"""A run directory: artifacts, provenance, console, metrics and tracking.

It must not know what a model or a data set is: to this package, a stage is a name, some settings and some files.
"""
