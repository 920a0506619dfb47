"""Make the report on one or several runs: sentences, tables, plots, and the models' answers side by side.

This package must not measure anything. It reads the artifacts of `evaluate` and of the stages that make models.
"""
