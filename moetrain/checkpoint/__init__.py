"""Checkpoints: a folder a step, written beside the old ones and renamed when whole. safetensors and json only."""

from __future__ import annotations

from moetrain.checkpoint.rng import rng_state, set_rng_state
from moetrain.checkpoint.store import Checkpoint, agree, latest, load, save

__all__ = ["Checkpoint", "agree", "latest", "load", "rng_state", "save", "set_rng_state"]
