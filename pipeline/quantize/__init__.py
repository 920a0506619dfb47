"""Rounds the experts of a trained model to the values of a block format, and accounts for the change that is kept.

It writes rounded experts with the pieces of the exports. It must not know how the model is trained afterwards.
"""
