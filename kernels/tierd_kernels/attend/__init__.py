"""The value pass: weights times values, over the blocks that are kept."""
