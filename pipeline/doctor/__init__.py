"""Describe the data, compute the memory and disk space that the run needs, and find problems.

Each kind of figure has its own file.

This package must not load weights. The tokenizer and the sizes in config.json are enough.
"""
