"""What the ids of the byte-level model mean: 0..255 are byte values. Without PyTorch, so that what makes data need not load it."""

END = 256  # closes an answer, separates documents
VOCABULARY = 264  # the rest is padding to a multiple of 8
