"""Adaptive bitrate streaming (ABR): simulator, policies, experience pools, fine-tuning, diagnosis."""
