"""What a server counts, in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cogtune.generate.engine import InferenceEngine


class Metrics:
    """Counters of this server, not of the process, so that a process may run several servers."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "cogtune"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **made)
        self.tokens = Counter("generated_tokens", "Tokens of answers.", **made)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **made)
        self.seconds = Histogram("request_seconds", "From a request's arrival to its end.", ["route"], **made)
        self.first = Histogram("first_piece_seconds", "From a request's arrival to the first text.", **made)
        Gauge("running", "Answers being computed.", **made).set_function(lambda: engine.running)
        Gauge("waiting", "Requests without a slot yet.", **made).set_function(lambda: engine.waiting)
        Gauge("guessed_tokens", "Guessed by prompt look-up.", **made).set_function(lambda: engine.guessed)
        Gauge("guessed_tokens_right", "Of these, right.", **made).set_function(lambda: engine.guessed_right)
        Gauge("picture_cache_bytes", "Memory of kept pictures.", **made).set_function(lambda: engine.pictures.nbytes)
