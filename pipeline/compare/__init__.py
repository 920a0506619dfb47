"""The report on one or several runs: figures in words, tables and plots, and answers side by side.

This package must not measure anything. It reads the artifacts of `evaluate` and of the stages that make models.
"""
