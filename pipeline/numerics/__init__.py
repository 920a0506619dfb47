"""Block-scaled number formats: their definitions, and the conversion of values to codes and scales and back.

This package must not know models. It imports torch, but no other package of this program.
"""
