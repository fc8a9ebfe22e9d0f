"""Adaptive bitrate streaming (ABR): simulator, policies, experience pools, fine-tuning, diagnosis."""

from netllm_lib.runs import PROJECT

ARITHMETIC = 1
"""Raised by whoever changes what the simulator, the policies, the pools or the diagnosis compute; see `netllm_lib.ARITHMETIC`."""
FETCHED = PROJECT / "data" / "netllm"
"""Where NetLLM's own data are, once they were fetched."""
