"""Peers from outside of Transformers: short programs that do the same work by other means, to be read beside ours."""
