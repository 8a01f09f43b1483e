"""Keeping less: retention, the lineage of what is forgotten, and pictures that nothing refers to.

Comes in: limits, ids. Goes out: counts. Must not import torch, vllm or fastapi.
"""

from noria.store.privacy.lineage import LineageStore
from noria.store.privacy.pictures import PictureStore
from noria.store.privacy.retention import Limits, Pruned, RetentionStore

__all__ = ["Limits", "LineageStore", "PictureStore", "Pruned", "RetentionStore"]
