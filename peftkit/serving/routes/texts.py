"""Classes, spans and vectors of texts: /v1/classify, /v1/tag, /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from peftkit.inference.trained_model import LoadedRun
from peftkit.serving.errors import RequestError
from peftkit.serving.route import ROUTES, Body, Route, read

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Input = str | list[str] | list[Pair]


class TextsBody(Body):
    """A text, texts, or pairs of texts."""

    input: Input


class EmbeddingsBody(TextsBody):
    """OpenAI's fields."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class OfTexts(Route):
    """What the routes of texts share."""

    def texts_of(self, body: TextsBody) -> list[Any]:
        """The texts, or tuples of two.

        Raises:
            RequestError: none, or too many.
        """
        texts = [body.input] if isinstance(body.input, str) else list(body.input)
        if not texts:
            raise RequestError("input: expected at least one text", param="input", code="invalid_value")
        if len(texts) > self.service.limits.texts:
            raise RequestError(
                f"input: expected at most {self.service.limits.texts} texts, found {len(texts)}", param="input",
                code="too_many_texts",
            )  # fmt: skip
        return [tuple(text) if isinstance(text, list) else text for text in texts]

    def record(self, request: Request, model: str, texts: list[Any], **values: Any) -> dict[str, int]:
        """Notes what was asked; returns OpenAI's usage."""
        plain = tuple(part for text in texts for part in ((text,) if isinstance(text, str) else text))
        tokens = sum(map(len, self.service.run.tokenizer(list(plain), truncation=True)["input_ids"]))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        request.state.record |= {"model": model, "texts": plain, "usage": {"prompt": tokens}, **values}
        return usage


class Answers(OfTexts):
    """The head's answer to each text."""

    async def answer(self, request: Request) -> Response:
        body = await read(request, TextsBody)
        model, texts = self.service.adapter(body.model), self.texts_of(body)
        answers = await self.service.batched(model, "answers", self.service.run.predict, texts)
        answers = self.service.run.head.complete_answers(answers, texts)  # of this request alone
        shown = [{"index": number, **answer.columns()} for number, answer in enumerate(answers)]
        labels, probabilities = zip(*(answer.observed() for answer in answers))
        usage = self.record(request, model, texts, labels=labels, probabilities=probabilities)
        return JSONResponse({"object": "list", "model": model, "data": shown, "usage": usage})


@ROUTES.register("classify")
class Classify(Answers):
    """The label of each text with the probability of every label, or the cosine or rank of a pair."""

    path: ClassVar[str] = "/v1/classify"

    @classmethod
    def serves(cls, run: LoadedRun) -> bool:
        return not run.head.writes_text and not run.head.marks_words


@ROUTES.register("tag")
class Tag(Answers):
    """The spans of each text, or the answer to each pair of a question and a context."""

    path: ClassVar[str] = "/v1/tag"

    @classmethod
    def serves(cls, run: LoadedRun) -> bool:
        return run.head.marks_words


@ROUTES.register("embeddings")
class Embeddings(OfTexts):
    """The vector of each text, of length 1, as OpenAI's endpoint gives it."""

    path: ClassVar[str] = "/v1/embeddings"

    async def answer(self, request: Request) -> Response:
        body = await read(request, EmbeddingsBody)
        model, texts = self.service.adapter(body.model), self.texts_of(body)

        def embed(every: Any) -> Any:
            return self.service.run.embed(every, normalize=True)

        kind = "vectors of pairs" if isinstance(texts[0], tuple) else "vectors"
        vectors = np.stack(await self.service.batched(model, kind, embed, texts))
        if body.dimensions is not None:
            if body.dimensions > vectors.shape[1]:
                raise RequestError(
                    f"dimensions: the vectors have {vectors.shape[1]}, found {body.dimensions}", param="dimensions",
                    code="invalid_value",
                )  # fmt: skip
            vectors = vectors[:, : body.dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        usage = self.record(request, model, texts)
        data = [
            {"object": "embedding", "index": number, "embedding": _spelled(vector, body.encoding_format)}
            for number, vector in enumerate(vectors.astype("<f4"))
        ]
        return JSONResponse({"object": "list", "model": model, "data": data, "usage": usage})


def _spelled(vector: np.ndarray, encoding: str) -> Any:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
