"""What is in the data, what the run needs, and what of it will hurt: one file for each kind of figure.

It must not load weights: the tokenizer and the sizes in config.json are enough.
"""
