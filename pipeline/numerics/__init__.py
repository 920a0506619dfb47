"""Block-scaled number formats: their definitions, and the conversion of values to codes and scales and back.

It must not know models: it imports torch and no other package of this program.
"""
