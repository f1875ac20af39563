"""Blocks of K and V: store into them, attend over them, copy between them; on a CPU and in Triton."""
