"""The counters of a server, in Prometheus' text format (version 0.0.4).

Only the thread of the event loop changes the counters, so they need no lock.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections import Counter
from collections.abc import Mapping

INFINITY = float("inf")
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, INFINITY)  # seconds, upper limits


class Metrics:
    """Counters since the start of the server.

    Attributes:
        requests: number of requests by route ("refused" for errors) and status.
        tokens: number of tokens, "prompt" and "generated".
        finished: number of answers by the reason for their end.
        first: number of answers whose first token came within each limit of BUCKETS.
        first_sum: sum of the times to the first token, in seconds.
        pace: moving average of the time of an answer, in seconds.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.first: Counter[float] = Counter()
        self.first_sum = 0.0
        self.pace = 1.0

    def record_first_token(self, seconds: float) -> None:
        """Count the first token of an answer.

        Args:
            seconds: time since the request.
        """
        self.first_sum += seconds
        self.first.update(limit for limit in BUCKETS if seconds <= limit)

    def record_end(self, reason: str, seconds: float) -> None:
        """Count an answer that has ended.

        Args:
            reason: the reason for the end: stop, length, timeout or error.
            seconds: time since the request.
        """
        self.finished[reason] += 1
        self.pace += 0.2 * (seconds - self.pace)

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return the page that Prometheus reads.

        Args:
            gauges: name -> present value, for example the length of the queue.

        Returns:
            All counters and gauges, one value a line.
        """
        requests = {}
        for (route, status), count in self.requests.items():
            requests[f'{{route="{route}",status="{status}"}}'] = count
        tokens = {f'{{kind="{kind}"}}': count for kind, count in self.tokens.items()}
        finished = {f'{{reason="{reason}"}}': count for reason, count in self.finished.items()}

        lines = _metric(
            "requests_total", "counter", "Requests answered, by route and status.", requests
        )
        lines += _metric(
            "tokens_total", "counter", "Tokens read from prompts and generated.", tokens
        )
        lines += _metric("answers_total", "counter", "Answers that ended, by reason.", finished)
        lines += _metric(
            "first_token_seconds",
            "histogram",
            "From a request to the first token of its answer.",
            self._first_token_histogram(),
        )
        for name, value in gauges.items():
            help_text = f"{name.replace('_', ' ').capitalize()} now."
            lines += _metric(name, "gauge", help_text, {"": value})
        return "\n".join(lines) + "\n"

    def _first_token_histogram(self) -> dict[str, float]:
        """Return the cumulative buckets, the sum and the count."""
        histogram: dict[str, float] = {}
        for limit in BUCKETS:
            label = "+Inf" if limit == INFINITY else str(limit)
            histogram[f'_bucket{{le="{label}"}}'] = self.first[limit]
        histogram["_sum"] = self.first_sum
        histogram["_count"] = self.first[INFINITY]
        return histogram


def _metric(name: str, kind: str, help_text: str, values: Mapping[str, float]) -> list[str]:
    """Return the lines of one metric; the keys of `values` are suffixes and labels."""
    lines = [f"# HELP minilora_{name} {help_text}", f"# TYPE minilora_{name} {kind}"]
    for labels, value in values.items():
        lines.append(f"minilora_{name}{labels} {value}")
    return lines
