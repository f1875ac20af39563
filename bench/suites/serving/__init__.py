"""A whole engine from outside, as who serves people sees it: prompts beside decoding, arrivals, the first minute.

What must be reached, and what vLLM 0.26.0 does by the same method (one H100, FlashAttention 3; a fixed reference),
stands beside the figures. Part of the suite `limit`.
"""
