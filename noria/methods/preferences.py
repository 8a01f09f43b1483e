"""What an operator can turn of the preference methods: each one's loss, and how it goes over its data.

Comes in: a tree. Goes out: frozen settings, with contradictions refused by both keys. Must not import torch.
A recipe's stage has the loss alone; its schedule is in the stage's own words. docs/methods.md says which is for what.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from noria.methods.table import PreferenceMethod
from noria.module_settings import Section

_SMOOTHED = ("sigmoid", "robust")  # DPO's losses in which a judgement may be wrong
ROBUST_SMOOTHING = 0.1
BETAS = {"sigmoid_norm": 5.0}  # of log ratios a token, which are small: Tülu 3's choice
BETA = 0.1


class _Loss(Section):
    method: ClassVar[PreferenceMethod]


class _Schedule(Section):
    """How a method goes over its data."""

    method: ClassVar[PreferenceMethod]
    epochs: float = Field(3.0, gt=0)
    """Passes over the training pairs."""
    batch_size: int = Field(4, ge=1)
    """Pairs in one optimiser step."""
    micro_batch_size: int = Field(2, ge=1)
    """Pairs in one forward; divides batch_size."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of steps over which the learning rates rise."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clip."""
    max_length: int = Field(1024, ge=32)
    """Prompt plus answer, in tokens; a longer pair is left out and counted."""
    seed: int = 0
    """Seed of data order and initialisation."""

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            name = self.method
            raise ValueError(
                f"{name}.batch_size={self.batch_size} is not a multiple of "
                f"{name}.micro_batch_size={self.micro_batch_size}; change one of the two"
            )
        return self


class DpoLoss(_Loss):
    """Direct preference optimisation's loss and its variants."""

    method: ClassVar[PreferenceMethod] = "dpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"] = "sigmoid"
    """TRL's names. `sigmoid` is DPO's own, `hinge` SLiC's, `ipo` bounds the margin, `robust` allows for judgements that
    are wrong, `sigmoid_norm` divides log ratios by the answers' lengths."""
    beta: float | None = Field(None, gt=0)
    """Strength of the pull to the reference; none is 0.1, and 5 for `sigmoid_norm`."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """Share of judgements that are taken to be wrong, for `sigmoid` (conservative DPO) and `robust`; none is 0, and 0.1
    for `robust`."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood a token beside the loss: RPO."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> Self:
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            told = f"dpo.label_smoothing={self.label_smoothing} would be ignored: dpo.loss_type={self.loss_type!r}"
            raise ValueError(f"{told} has no such term; use 'sigmoid' or 'robust', or drop one of the two")
        if self.loss_type == "robust" and self.label_smoothing == 0:
            told = "dpo.label_smoothing=0 contradicts dpo.loss_type='robust', which corrects for wrong judgements"
            raise ValueError(f"{told}: say a share above 0, or use 'sigmoid'")
        return self

    @property
    def strength(self) -> float:
        """`beta`, filled in."""
        return BETAS.get(self.loss_type, BETA) if self.beta is None else self.beta

    @property
    def smoothing(self) -> float:
        """`label_smoothing`, filled in."""
        default = ROBUST_SMOOTHING if self.loss_type == "robust" else 0.0
        return default if self.label_smoothing is None else self.label_smoothing


class SimpoLoss(_Loss):
    """SimPO's loss."""

    method: ClassVar[PreferenceMethod] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Scale of the answers' mean log-probabilities."""
    gamma: float = Field(1.0, ge=0)
    """The margin by which the chosen answer is to be better, in the same unit as beta times nats."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of judgements that are taken to be wrong."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood a token: above 0 it is CPO-SimPO."""


class OrpoLoss(_Loss):
    """ORPO's loss."""

    method: ClassVar[PreferenceMethod] = "orpo"
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio's term beside the chosen answer's likelihood; the paper's lambda."""


class CpoLoss(_Loss):
    """CPO's loss."""

    method: ClassVar[PreferenceMethod] = "cpo"
    beta: float = Field(0.1, gt=0)
    """Scale of the difference of log-probabilities."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of judgements that are taken to be wrong."""
    nll_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood a token; the paper's is 1."""


class KtoLoss(_Loss):
    """KTO's loss."""

    method: ClassVar[PreferenceMethod] = "kto"
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of answers with a thumb up. The paper wants weight times number of these to be 1 to 4/3 of the others'."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of answers with a thumb down."""


class MpoLoss(_Loss):
    """MPO's loss: a weighted sum of three."""

    method: ClassVar[PreferenceMethod] = "mpo"
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    preference_weight: float = Field(0.8, ge=0)
    """Weight of DPO's loss: which answer is better."""
    quality_weight: float = Field(0.2, ge=0)
    """Weight of BCO's loss: whether each answer is good by itself."""
    generation_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood a token."""

    @model_validator(mode="after")
    def _something_is_preferred(self) -> Self:
        if not self.preference_weight and not self.quality_weight:
            told = "mpo.preference_weight=0 and mpo.quality_weight=0 leave the rejected answers unread"
            raise ValueError(f"{told}: one of them must be above 0")
        return self


class DpoSettings(_Schedule, DpoLoss):
    """Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7)."""


class SimpoSettings(_Schedule, SimpoLoss):
    """Simple preference optimisation (Meng et al. 2024, https://arxiv.org/abs/2405.14734, eq. 6), without a
    reference."""


class OrpoSettings(_Schedule, OrpoLoss):
    """Odds ratio preference optimisation (Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 6 and 7), without a
    reference."""


class CpoSettings(_Schedule, CpoLoss):
    """Contrastive preference optimisation (Xu et al. 2024, https://arxiv.org/abs/2401.08417), without a reference."""


class MpoSettings(_Schedule, MpoLoss):
    """Mixed preference optimisation (Wang et al. 2024, https://arxiv.org/abs/2411.10442)."""


class KtoSettings(_Schedule, KtoLoss):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306), from thumbs."""

    epochs: float = Field(3.0, gt=0)
    """Passes over the answers with a thumb."""
    batch_size: int = Field(8, ge=2)
    """Answers in one optimiser step."""
    micro_batch_size: int = Field(4, ge=2)
    """Answers in one forward, over which the KL is estimated; divides batch_size."""
    max_length: int = Field(1024, ge=32)
    """Prompt plus answer, in tokens; a longer one is left out and counted."""


PreferenceLoss = DpoLoss | SimpoLoss | OrpoLoss | CpoLoss | KtoLoss | MpoLoss
PreferenceSettings = DpoSettings | SimpoSettings | OrpoSettings | CpoSettings | KtoSettings | MpoSettings
SETTINGS: dict[PreferenceMethod, type[PreferenceSettings]] = {
    "dpo": DpoSettings,
    "simpo": SimpoSettings,
    "orpo": OrpoSettings,
    "cpo": CpoSettings,
    "kto": KtoSettings,
    "mpo": MpoSettings,
}
