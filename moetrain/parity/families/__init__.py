"""The reference blocks, by how they keep their weights and what they share; see ``moetrain.parity.cases``."""
