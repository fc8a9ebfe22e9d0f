"""NetLLM companion: reproduce NetLLM's bitrate adaptation, and explain the gap to the baselines."""

__version__ = "0.1.0"

ARITHMETIC = 1
"""Raised by whoever changes what the PLM, the training or the statistics compute: finished runs that used them are made again.
`tests/test_arithmetic.py` tells when. A change of speed, words or figures is none."""
