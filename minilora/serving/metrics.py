"""What a server counts, in Prometheus' text format (version 0.0.4). All is counted in the event loop's thread."""

from collections import Counter
from collections.abc import Mapping

FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds, the bounds of the histogram


class Metrics:
    """Counters since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route (refused: none) and status
        self.tokens: Counter[str] = Counter()  # prompt, generated
        self.finished: Counter[str] = Counter()  # by why an answer ended
        self.first: Counter[float] = Counter()  # first tokens within so many seconds
        self.first_sum = 0.0
        self.pace = 1.0  # seconds of an answer, lately

    def began(self, seconds: float) -> None:
        """The first token of an answer came after so long."""
        self.first_sum += seconds
        self.first.update(bound for bound in (*FIRST, float("inf")) if seconds <= bound)

    def ended(self, reason: str, seconds: float) -> None:
        """An answer is over."""
        self.finished[reason] += 1
        self.pace += 0.2 * (seconds - self.pace)

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page that Prometheus reads; `gauges` are values of now."""
        lines: list[str] = []

        def metric(name: str, kind: str, help: str, values: Mapping[str, float]) -> None:
            lines.extend([f"# HELP minilora_{name} {help}", f"# TYPE minilora_{name} {kind}"])
            lines.extend(f"minilora_{name}{labels} {value}" for labels, value in values.items())

        requests = {f'{{route="{route}",status="{code}"}}': n for (route, code), n in self.requests.items()}
        metric("requests_total", "counter", "Requests answered, by route and status.", requests)
        tokens = {f'{{kind="{kind}"}}': n for kind, n in self.tokens.items()}
        metric("tokens_total", "counter", "Tokens read from prompts and generated.", tokens)
        finished = {f'{{reason="{reason}"}}': n for reason, n in self.finished.items()}
        metric("answers_total", "counter", "Answers that ended, by reason.", finished)
        first = {f'_bucket{{le="{"+Inf" if b == float("inf") else b}"}}': self.first[b] for b in (*FIRST, float("inf"))}
        first |= {"_sum": self.first_sum, "_count": self.first[float("inf")]}
        metric("first_token_seconds", "histogram", "From a request to the first token of its answer.", first)
        for name, value in gauges.items():
            metric(name, "gauge", f"{name.replace('_', ' ').capitalize()} now.", {"": value})
        return "\n".join(lines) + "\n"
