"""The sentences that end a merge report: what a merge keeps, and what to do."""

SAFE_SHARE = 0.99  # smallest share of what the adapter learned that a safe merge keeps
FAIR_SHARE = 0.95  # the report advises against a merge that keeps a smaller share
SAFE_ERROR = 0.02  # largest error, relative to ‖ΔW‖, that is safe without a measurement
LITTLE_COSINE = 0.5  # below this cosine, most of the update's direction is lost


def measured_conclusion(kept: dict[str, float], target: str) -> str:
    """Return the sentence of a target whose loss was measured.

    Args:
        kept: Share of what the adapter learned that each target keeps.
        target: The target, a key of `kept`.
    """
    share = kept[target]
    if share >= SAFE_SHARE:
        return f"keeps {min(share, 1):.1%} of what the adapter learned; safe."
    if share >= FAIR_SHARE:
        return f"keeps {share:.1%} of what the adapter learned; a small loss."
    best = max(kept, key=kept.__getitem__)
    remedy = "keep the adapter separate"
    if kept[best] >= FAIR_SHARE:
        remedy += f", or merge into {best}"
    return f"loses {min(1 - share, 1):.0%} of what the adapter learned; {remedy}."


def conclusion_from_weights(target: str, error: float, cosine: float) -> str:
    """Return the sentence of a target whose loss is not known.

    Args:
        target: The target.
        error: Error of its weights, relative to ‖ΔW‖.
        cosine: Cosine of the stored update with ΔW.
    """
    if error <= SAFE_ERROR:
        return f"stores the adapter's update with an error of {error:.2%}; safe."
    if target == "original":
        return (
            "removes the rounding to 4 bits that the adapter was trained with. The weights cannot "
            "tell what this costs or gains: measure the loss on held-out rows."
        )
    if cosine < LITTLE_COSINE:
        return (
            f"keeps little of the adapter's update (cosine {cosine:.2f}); keep the adapter "
            "separate, or measure the loss on held-out rows."
        )
    return (
        f"rounding adds an error of {error:.0%} of the adapter's update, in random directions. The "
        "weights cannot tell what this costs: measure the loss on held-out rows."
    )
