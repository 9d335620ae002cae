"""Wrappers that lay a plain model over the mesh from outside, without changing a number: `apply.lay` does."""
