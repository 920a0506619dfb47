"""From a proven export to the Hugging Face Hub: the model card and the upload.

It must not change a byte of the export, nor publish what `verify` has not passed.
"""
