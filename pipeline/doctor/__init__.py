"""Describes the data, computes the needs of the run, and finds problems of both. Each kind of figure has its own file.

This package must not load weights. The tokenizer and the sizes in config.json are enough.
"""
