"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # bounds of histograms


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "ngpt", "registry": self.registry}
        ProcessCollector(registry=self.registry)
        self.responses = Counter("http_responses", "Answers by path and status.", ("path", "status"), **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that got a slot.", **own)
        self.generated_tokens = Counter("generated_tokens", "Tokens that were generated.", **own)
        self.steps = Counter("decoding_steps", "Steps of the batch; each gives every running choice a token.", **own)
        self.choices = Counter("choices", "Choices that have ended, by reason.", ("reason",), **own)
        self.first_token = Histogram(
            "first_token_seconds",
            "From the arrival of a request to the first token of a choice.",
            buckets=SECONDS,
            **own,
        )
        self.choice_seconds = Histogram(
            "choice_seconds", "From the arrival of a request to the end of a choice.", buckets=SECONDS, **own
        )
        self._running = Gauge("choices_running", "Choices that have a slot.", **own)
        self._waiting = Gauge("choices_waiting", "Choices that wait for a slot.", **own)
        self._slots = Gauge("slots", "Choices that can run at a time.", **own)

    def follow(self, running: Callable[[], int], waiting: Callable[[], int], slots: int) -> None:
        """Lets the gauges read these numbers whenever the metrics are asked for."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._slots.set(slots)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
