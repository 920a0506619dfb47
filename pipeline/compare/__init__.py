"""The report: the figures of a run, or of several, in words, tables and plots.

It must not measure anything: it reads what `evaluate` and the other stages left.
"""
