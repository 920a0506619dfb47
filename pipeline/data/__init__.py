"""From rows to conversations, to Harmony, to tokens and labels.

It must not know models: all it needs of one is its tokenizer.
"""
