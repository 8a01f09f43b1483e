"""Sampling from serving engines, for a trainer: groups of answers with their token ids and log-probabilities.

`SamplingPool` spreads prompts over several addresses. Must not import serve or train: it knows the wire only.
"""

from noria.sampling.pool import SamplingPool
from noria.sampling.records import Drawing, Group, Sample

__all__ = ["Drawing", "Group", "Sample", "SamplingPool"]
