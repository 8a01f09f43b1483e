"""How right one answer is.

Comes in: a question and the model's answer. Goes out: a score from 0 to 1. Pure functions; nothing is guessed, an
answer that cannot be read is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from noria.evals.normalise import letter_of, normalised, number_in, says, vqa_words, yes_or_no
from noria.evals.questions import Question

ANLS_THRESHOLD = 0.5
VQA_AGREE = 3  # so many people who say the same make an answer wholly right


def score(question: Question, answer: str) -> float:
    """The question's own metric over the answer; with several right answers, the best one counts."""
    wanted = question.answers
    match question.metric:
        case "exact":
            return float(normalised(answer) in {normalised(one) for one in wanted})
        case "contains":
            return float(any(says(answer, one) for one in wanted))
        case "choice":
            return float(letter_of(answer, question.options) in wanted)
        case "number":
            return float(any(near(answer, one, question.tolerance) for one in wanted))
        case "anls":
            return anls(answer, wanted)
        case "vqa":
            return vqa_accuracy(answer, wanted)
        case "yes_no":
            return float(yes_or_no(answer) in wanted)


def near(answer: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Whether the answer's number is the wanted one, within `tolerance` (absolute) or a millionth (relative)."""
    said, right = number_in(answer), number_in(wanted)
    return said is not None and right is not None and abs(said - right) <= max(tolerance, 1e-6 * abs(right))


def anls(answer: str, wanted: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity to the nearest right answer, 0 at or beyond the threshold's distance.

    s = 1 - NL where NL < threshold, else 0; NL is the edit distance over the longer length, without regard to case
    (Biten et al. 2019, https://arxiv.org/abs/1905.13648, eq. 1). The set's mean of it is ANLS.
    """
    return max((_similarity(_spaced(answer), _spaced(one), threshold) for one in wanted), default=0.0)


def _similarity(said: str, right: str, threshold: float) -> float:
    longer = max(len(said), len(right))
    distance = edit_distance(said, right) / longer if longer else 0.0
    return 1.0 - distance if distance < threshold else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and substitutions of one character (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(n/3, 1), n of the people having said the same, averaged over leaving out each person in turn.

    With ten people, and m of them saying it: m=1 gives 0.3, 2 gives 0.6, 3 gives 0.9, 4 gives 1
    (Antol et al. 2015, https://arxiv.org/abs/1505.00468; TextVQA, Singh et al. 2019, https://arxiv.org/abs/1904.08920).
    """
    same = Counter(vqa_words(one) for one in people)[vqa_words(answer)]
    others = len(people)
    with_one_less, with_all = (min(n / VQA_AGREE, 1.0) for n in (max(same - 1, 0), same))
    return (same * with_one_less + (others - same) * with_all) / others if others else 0.0
