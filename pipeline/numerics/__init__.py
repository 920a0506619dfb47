"""Block-scaled number formats: what they are, how values become codes and scales, and how they come back.

It must not know models: it needs torch and nothing else of this program.
"""
