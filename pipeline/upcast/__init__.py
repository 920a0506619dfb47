"""Makes the checkpoint that training starts from: linked, decoded to BF16, or packed as MXFP4.

This package must not know how the checkpoint is trained. The stage decides which form of the experts training needs.
"""
