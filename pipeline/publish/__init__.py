"""From a proven export to the Hub: the model card, and the upload."""
