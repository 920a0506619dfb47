"""Write the model card of an export, and upload the card and the export to the Hugging Face Hub.

This package must not change any byte of the export. It may only upload an export that has passed `verify`.
"""
