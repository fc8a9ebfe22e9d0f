"""Adaptive bitrate streaming (ABR): simulator, policies, experience pools, fine-tuning, diagnosis."""

ARITHMETIC = 1
"""Raised by whoever changes what the simulator, the policies, the pools or the diagnosis compute; see `netllm_lib.ARITHMETIC`."""
