"""Every comparison. Not among them, because the block does what is no part of an MoE layer here: Inkling (routed and
shared weights normalised together), Zaya (a router with memory of the layer below), Gemma 4 (a normalised router beside
a dense network), Muse Spark and Nemotron-H with a latent size (projections around the experts); and NLLB, whose sparse
block is broken in the pinned transformers.
"""

from __future__ import annotations

from moetrain.parity.case import Case
from moetrain.parity.families.biased import BIASED
from moetrain.parity.families.groups import GROUPED
from moetrain.parity.families.sigmoid import SIGMOID
from moetrain.parity.families.softmax import SOFTMAX
from moetrain.parity.families.special import SPECIAL

CASES: tuple[Case, ...] = SOFTMAX + GROUPED + SIGMOID + BIASED + SPECIAL
