"""Define block-scaled number formats. Encode values as codes and scales, and decode them.

This package must not know models. It imports torch, but no other package of this program.
"""
