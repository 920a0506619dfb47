"""What doctor looks at: one file for each kind of figure, one for what the figures mean, one for how they are shown.

Figures are plain JSON values, named as they stand in artifact.json, so that other programs can read them.
"""
