"""Packing: many samples in one sequence, attention and positions kept apart, no padding, the same loss.

Comes in: samples, their lengths, the model that will read the packs. Goes out: packs, and batches of one row.
Must not import `serve`.
"""

from train.data.packing.attention import attend_by_sample
from train.data.packing.fitting import plan
from train.data.packing.rows import PackedCollator

__all__ = ["PackedCollator", "attend_by_sample", "plan"]
