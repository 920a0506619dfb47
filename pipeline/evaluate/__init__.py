"""What a model predicts and answers, and how good that is: generation, scorers, statistics.

It must not know how a model was made: all models are loaded, asked and scored alike.
"""
