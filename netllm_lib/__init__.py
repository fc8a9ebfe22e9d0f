"""NetLLM companion: reproduce NetLLM's bitrate adaptation, and explain the gap to the baselines."""

__version__ = "0.1.0"
