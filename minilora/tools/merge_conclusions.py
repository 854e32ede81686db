"""The verdicts that end a merge report: what a merge keeps, and what to do.

    recovery = (L_base − L_merged) / (L_base − L_adapter)     share of what the adapter learned
    nats     = L_merged − L_adapter                           how much worse than the adapter

L_adapter is the loss with the adapter unmerged, and L_base the loss without it. A share alone can
mislead: an adapter that lowers the loss from 11 to 1 nat, by learning the form of the answers, keeps
98 % of it with 0.2 nats more, which is a perplexity 22 % higher. So a verdict needs both.
"""

from typing import NamedTuple

SAFE_SHARE = 0.99  # smallest recovery of a safe merge
SAFE_NATS = 0.02  # largest loss above the adapter of a safe merge: 2 % of perplexity
FAIR_SHARE = (
    0.95  # smallest recovery of a merge with a small loss; below it, the report advises not
)
FAIR_NATS = 0.1  # largest loss above the adapter of a merge with a small loss
SAFE_ERROR = 0.02  # largest error, relative to ‖ΔW‖, that is safe without a measurement
LEAST_PROJECTION = 0.9  # smallest part of ΔW that a merge should store, without a measurement


class Measured(NamedTuple):
    """The cost of one target, measured on held-out rows.

    Attributes:
        recovery: Share of what the adapter learned.
        nats: Loss above that of the adapter, in nats per token.
    """

    recovery: float
    nats: float

    @property
    def safe(self) -> bool:
        """True if the merge costs almost nothing."""
        return self.recovery >= SAFE_SHARE and self.nats <= SAFE_NATS

    @property
    def fair(self) -> bool:
        """True if the merge costs little; the merges that are safe are fair too."""
        return self.recovery >= FAIR_SHARE and self.nats <= FAIR_NATS


def measured_conclusion(measured: dict[str, Measured], target: str) -> str:
    """Return the sentence of a target whose loss was measured.

    Args:
        measured: The measurements by target.
        target: The target, a key of `measured`.
    """
    figures = measured[target]
    above = f"{figures.nats:+.3f} nats against the unmerged adapter"
    if figures.safe:
        return f"keeps {min(figures.recovery, 1):.1%} of what the adapter learned, {above}; safe."
    if figures.fair:
        return f"keeps {figures.recovery:.1%} of what the adapter learned, {above}; a small loss."
    best = min(measured, key=lambda name: measured[name].nats)
    remedy = "keep the adapter separate"
    if measured[best].fair:
        remedy += f", or merge into {best}"
    lost = min(1 - figures.recovery, 1)
    return f"loses {lost:.1%} of what the adapter learned, {above}; {remedy}."


def conclusion_from_weights(target: str, error: float, projection: float, size: float) -> str:
    """Return the sentence of a target whose loss is not known.

    Args:
        target: The target.
        error: Error of its weights, relative to ‖ΔW‖.
        projection: Part of ΔW that it stores.
        size: ‖ΔW‖ / ‖W‖.
    """
    if error <= SAFE_ERROR:
        return f"stores the adapter's update with an error of {error:.2%}; safe."
    if target == "original":
        return (
            "removes the rounding to 4 bits that the adapter was trained with. The weights cannot "
            "tell what this costs or gains: measure the loss on held-out rows."
        )
    if projection < LEAST_PROJECTION:
        return (
            f"stores {projection:.0%} of the adapter's update; keep the adapter separate, or "
            "measure the loss on held-out rows."
        )
    return (
        f"stores {projection:.0%} of the adapter's update, and adds noise of {error * size:.2%} of "
        "the weights. The weights cannot tell what this costs: measure the loss on held-out rows."
    )


def refusal(target: str, measured: dict[str, Measured], projection: float) -> str | None:
    """Return why a merge should not be written; None if it may be.

    Args:
        target: The target.
        measured: The measurements by target; without the target, the projection decides.
        projection: Part of ΔW that the target stores.
    """
    if target in measured:
        figures = measured[target]
        if figures.fair:
            return None
        return (
            f"recovery {figures.recovery:.3f}, {figures.nats:+.3f} nats against the unmerged "
            f"adapter, expected {FAIR_SHARE} or more and {FAIR_NATS:+} or less"
        )
    if projection >= LEAST_PROJECTION:
        return None
    return f"projection {projection:.2f} on the update, expected {LEAST_PROJECTION} or more"
