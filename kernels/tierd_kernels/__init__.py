"""Certified attention over a quantised KV cache: tensors in, tensors out. `ladder.attend` is the way in."""
