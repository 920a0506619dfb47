"""Rounds the experts of a trained model to the values of a block format, and accounts for the change that is kept.

This package must not know how the model is trained afterwards, or how it is exported.
"""
