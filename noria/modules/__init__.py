"""The three-module map: which part of a vision-language model each parameter belongs to, under every spelling.

Comes in: a checkpoint's `config.json`, parameter names. Goes out: `Architecture`, which sorts names into
`vision_tower`, `aligner` and `language_model`, lists the linears that are quantised and trained, and translates names.
A table of strings: imports neither torch nor transformers.
"""

from noria.modules.architecture import Architecture, GptqTree, Part, Spelling
from noria.modules.table import ARCHITECTURES, architecture_of

__all__ = ["ARCHITECTURES", "Architecture", "GptqTree", "Part", "Spelling", "architecture_of"]
