"""Pictures that are made, not gathered: drawn scenes, handwritten digits and a few photographs, with what they show.

Comes in: a reference (`scene:...`, `digit:...`, `photo:...`) or a set's name. Goes out: a picture, rows for training,
or held-out questions. Pillow and numpy are imported when the first picture is made; torch and `train` never.
"""

from noria.scenes.asked import PictureQuestion, held_out_questions, scene_questions
from noria.scenes.pictures import draw, is_made
from noria.scenes.sets import SETS, rows

__all__ = [
    "SETS",
    "PictureQuestion",
    "draw",
    "held_out_questions",
    "is_made",
    "rows",
    "scene_questions",
]
