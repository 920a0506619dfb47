"""Write the model card of an export, and upload the card and the export to the Hugging Face Hub.

This package must not change any byte of the export, nor upload an export that `verify` has not passed.
"""
