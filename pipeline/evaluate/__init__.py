"""Evaluate models: generate answers, score answers and predictions, and compare models statistically.

This package must not know how a model was made. All models are loaded, asked and scored in the same way.
"""
