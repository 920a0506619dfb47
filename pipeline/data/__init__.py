"""Turns the rows of data sets into conversations, and the conversations into tokens and labels.

This package must not depend on the model's code. It needs only the model's tokenizer.
"""
