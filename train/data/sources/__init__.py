"""Where training data comes from: files and folders, URLs, Hugging Face data sets, and what Noria draws itself.

Comes in: a recipe's `DataSource`s. Goes out: samples with a report of every row, and a loader for their pictures.
Must not import torch, transformers or `serve`.
"""

from train.data.sources.loader import ImageLoader
from train.data.sources.mixed import MixedData, read_all
from train.data.sources.reading import SourceData, read

__all__ = ["ImageLoader", "MixedData", "SourceData", "read", "read_all"]
