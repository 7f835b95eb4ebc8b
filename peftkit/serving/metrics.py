"""Prometheus metrics of the server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peftkit.serving.observers import RequestRecord

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, their seconds and tokens, of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("peftkit_requests", "Answered requests.", labels, registry=self.registry)
        self.seconds = Histogram(
            "peftkit_request_seconds", "Seconds until a request was answered.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("peftkit_tokens", "Tokens read and written.", ("kind",), registry=self.registry)
        self.in_flight = Gauge("peftkit_requests_in_flight", "Requests that wait.", registry=self.registry)

    def count(self, record: RequestRecord) -> None:
        """Adds an answered request."""
        self.requests.labels(record.route, str(record.status)).inc()
        self.seconds.labels(record.route).observe(record.seconds)
        for kind, count in record.usage.items():
            self.tokens.labels(kind).inc(count)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
