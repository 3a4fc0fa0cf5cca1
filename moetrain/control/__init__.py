"""Corrections: small controllers that act on balance while a run trains. All are off by default."""

from moetrain.control.control import Control

__all__ = ["Control"]
