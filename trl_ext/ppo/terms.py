"""The terms of the PPO loss as one table, and their coefficients; `ppo/losses.py` computes them.

Signs: what is maximised (`clip_objective`, `entropy`) is subtracted from the total, what is minimised is added.
Schulman 2017 (arXiv:1707.06347, eq. 9) writes the negative of this total: L^CLIP − c1·L^VF + c2·S.

A new term is a line in `TERMS`, a field of `PPOCoefficients`, and in `ppo/losses.py` a function, a field of `PPOTerms`
and a line in `ppo_terms`. The total, the log, the model card, the report and the option's help follow. The report
reads the table, so this file does not import torch, which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """
    One term of the loss.

    Args:
        name: its field of `PPOTerms`; logged as `terms/<name>`.
        formula: in the notation of docs/ppo.md.
        unit: of its mean.
        coefficient: its field of `PPOCoefficients`, logged as `coef/<coefficient>`; empty for the one of weight 1.
        option: of `PPOConfigX`, or of the model's config, that sets the coefficient.
        maximised: whether it is subtracted from the total.
        optional: whether only runs that use it log it and its coefficient.
    """

    name: str
    formula: str
    unit: str
    coefficient: str = ""
    option: str = ""
    maximised: bool = False
    optional: bool = False

    @property
    def sign(self) -> int:
        """Its sign in the total."""
        return -1 if self.maximised else 1

    @property
    def contribution(self) -> str:
        """Its contribution to the total, such as "−ent_coef · entropy"."""
        return f"{'−' if self.maximised else ''}{f'{self.option} · ' if self.option else ''}{self.name}"


TERMS = (
    Term("clip_objective", "min(ratio · Â, clip(ratio, 1 ± ε) · Â)", "unit of Â", maximised=True),
    Term("kl", "KL(π_θ ‖ π_ref)", "nats per token", "kl", "kl_coef"),
    Term("value_loss", "½ (V − R)²", "squared unit of the score", "vf", "vf_coef"),
    Term("entropy", "−Σ p log p", "nats per token", "entropy", "ent_coef", maximised=True),
    Term("old_kl", "KL[π_old ‖ π_θ]", "nats per token", "old_kl", "old_kl_coef"),
    Term(
        "aux_loss", "load balance of the experts", "as the model has it", "aux", "router_aux_loss_coef", optional=True
    ),
    Term(
        "positive_nll",
        "−log π of good responses",
        "nats per token",
        "positive_nll",
        "positive_nll_coef",
        optional=True,
    ),
)
WEIGHTED = tuple(term for term in TERMS if term.coefficient)
# Option -> what it is the coefficient of, for help texts.
WEIGHED_BY = {term.option: f"{term.formula}, {term.unit}" for term in WEIGHTED}


def total_in_words(terms: Sequence[Term] = TERMS) -> str:
    """Return the total as a formula: "−clip_objective + kl_coef·kl + …"."""
    parts = [
        f"{'−' if term.maximised else '+'} {f'{term.option}·' if term.option else ''}{term.name}" for term in terms
    ]
    return " ".join(parts).replace("− ", "−", 1)


@dataclass(frozen=True)
class PPOCoefficients:
    """The weights of the terms, none of them negative; the clipped objective has weight 1.

    `vf` is c1 and `entropy` c2 of Schulman 2017 eq. 9, `old_kl` the β of its eq. 8 (arXiv:1707.06347); `kl` weighs the
    distance to π_ref; `aux` weighs the model's own
    auxiliary loss, such as load balancing of experts, and `positive_nll` is VAPO's μ.
    """

    kl: float = 0.0
    vf: float = 0.5
    entropy: float = 0.0
    old_kl: float = 0.0
    aux: float = 0.0
    positive_nll: float = 0.0

    def of(self, term: Term) -> float:
        """Return a term's factor in the total, negative if it is maximised."""
        return term.sign * (getattr(self, term.coefficient) if term.coefficient else 1.0)
