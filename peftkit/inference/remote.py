"""A model behind an HTTP server that speaks OpenAI's API, for ``peftkit chat --url``."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkit.errors import PeftkitError, RunError, did_you_mean

KEY = "PEFTKIT_API_KEY"
SECONDS = 300


@dataclass
class RemoteModel:
    """What ``Chat`` needs of a loaded run: ``stream``, and the names that it can switch between."""

    url: str
    """Up to ``/v1``, which is added where it is missing."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the requests, such as temperature."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise RunError(f"--url {self.url}: expected an address such as http://127.0.0.1:8000")
        self.url = self.url.rstrip("/").removesuffix("/v1") + "/v1"
        with self._open("models") as response:
            self.adapters = tuple(entry["id"] for entry in json.load(response)["data"])
        self.adapter = self.adapters[0]

    def use_adapter(self, name: str) -> None:
        """Switches to another name; raises RunError if the server has none of it."""
        if name not in self.adapters:
            raise RunError(f"no model is called '{name}': {did_you_mean(name, self.adapters)}")
        self.adapter = name

    def stream(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """The answer in pieces; raises PeftkitError with the server's message."""
        body = {"model": self.adapter, "messages": list(messages), "stream": True, **self.options}
        with self._open("chat/completions", body) as response:
            for line in response:
                data = line.decode("utf-8").strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise PeftkitError(event["error"]["message"])
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            try:
                message = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = error.reason
            raise RunError(f"{self.url}: {message} (HTTP {error.code})") from None
        except OSError as error:
            raise RunError(
                f"{self.url}: no answer ({getattr(error, 'reason', error)}); is the server running?"
            ) from None
