"""The report of a step on sampled answers: a line of figures, and a table of answers.

    step 10: reward 0.42 (sd 0.31), 25% of groups without variance, 3% truncated, length 31.2,
    entropy 1.32, kl 0.004; log p of sampler and trainer differ by 1.1e-07, at most 2.4e-06 (bound
    3.9e-05)

All figures are also in log.jsonl, in the trackers and in `TrainResult.metrics`.
"""

from collections.abc import Sequence
from operator import attrgetter

from minilora.losses.on_policy import Answer

WIDTH = 100  # characters of an answer in the table
SHOWN = 2  # prompts in the table


def step_line(step: int, figures: dict[str, float]) -> str:
    """Return the figures of a step as one line.

    Args:
        step: Number of the step.
        figures: The figures of its rollout.
    """
    parts = []
    if "reward" in figures:
        parts.append(f"reward {figures['reward']:.4g} (sd {figures['reward_std']:.2g})")
        parts.append(f"{figures['zero_variance']:.0%} of groups without variance")
    parts.append(f"{figures['truncated']:.0%} truncated")
    parts.append(f"length {figures['length']:.1f}")
    parts.append(f"entropy {figures['entropy']:.3f}")
    if "kl" in figures:
        parts.append(f"kl {figures['kl']:.2g}")
    compared = (
        f"log p of sampler and trainer differ by {figures['sampler_mean']:.1e}, at most "
        f"{figures['sampler_max']:.1e} (bound {figures['sampler_bound']:.1e})"
    )
    return f"step {step}: {', '.join(parts)}; {compared}"


def answer_table(groups: Sequence[Sequence[Answer]]) -> str:
    """Return a table of the answers of the first groups, the best answer first.

    Args:
        groups: The answers of each prompt.
    """
    lines = []
    for group in groups[:SHOWN]:
        first = group[0]
        assert first.prompt is not None
        asked = _prompt_text(first.prompt.prompt)
        lines.append(f"  row {first.row}: {_short(asked)}")
        lines.append(f"  {'reward':>8}{'advantage':>11}  answer")
        for answer in sorted(group, key=attrgetter("reward"), reverse=True):
            end = ""
            if answer.truncated:
                end = " (truncated)"
            shown = _short(answer.text)
            lines.append(f"  {answer.reward:8.3g}{answer.advantage:+11.3f}  {shown}{end}")
    return "\n".join(lines)


def _prompt_text(prompt: object) -> str:
    """Return a prompt as text: of messages the last one."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt:
        return str(prompt[-1].get("content", ""))
    return repr(prompt)


def _short(text: str) -> str:
    """Return a text on one line, cut to WIDTH characters."""
    line = text.replace("\n", "\\n")
    if len(line) > WIDTH:
        line = line[:WIDTH] + "…"
    return line
