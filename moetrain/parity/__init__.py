"""Proof that the MoE layer gives what the blocks of the pinned Hugging Face transformers give, weights copied over."""
