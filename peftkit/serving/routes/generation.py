"""OpenAI's /v1/chat/completions and /v1/completions, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from peftkit.errors import PeftkitError
from peftkit.evaluation.generation import context_length, encode
from peftkit.inference.prompts import as_prompt, generation_config
from peftkit.inference.trained_model import LoadedRun
from peftkit.models import chat_template
from peftkit.serving.decoder import Piece
from peftkit.serving.decoder import Sequence as Text
from peftkit.serving.errors import RequestError
from peftkit.serving.route import ROUTES, Body, Fields, Route, read
from peftkit.serving.text_stream import TextStream
from peftkit.serving.text_stream import read as read_text

Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(Fields):
    """OpenAI's options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationBody(Body):
    """The fields that both endpoints share; those of OpenAI's that change nothing here must have their defaults."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(given):
            raise RequestError("stop: expected texts, found an empty one", param="stop", code="invalid_value")
        return given


class Part(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def turn(self) -> dict[str, str]:
        """As runs are trained on it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(GenerationBody):
    """A conversation that awaits an answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class CompletionBody(GenerationBody):
    """A text to continue."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False


class Generation(Route):
    """What both endpoints share."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    @classmethod
    def serves(cls, run: LoadedRun) -> bool:
        return run.head.writes_text

    async def run(self, request: Request, body: GenerationBody, prompt: list[int], texts: Sequence[str]) -> Response:
        """Writes the choices, and answers with them."""
        model = self.service.adapter(body.model)
        choices = self._choices(body, model, prompt)
        about = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 0, "total_tokens": len(prompt)}
        request.state.record |= {"model": model, "texts": tuple(texts)}
        if body.stream:
            events = self._events(request, body, choices, about, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        streams = [TextStream(self.service.run.tokenizer, body.stops) for _ in choices]
        writing = asyncio.gather(*(self._whole(text, stream) for text, stream in zip(choices, streams)))
        pieces = await self._unless_gone(request, writing)
        self._count(request, usage, sum(map(len, pieces)))
        answers = [
            self.choice(number, stream.text, stream.finish, self._logprobs(some), body)
            for number, (stream, some) in enumerate(zip(streams, pieces))
        ]
        return JSONResponse({**about, "object": self.object, "choices": answers, "usage": usage})

    def _choices(self, body: GenerationBody, model: str, prompt: list[int]) -> list[Text]:
        limit = self._limit(body, prompt)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        config = generation_config(self.service.run.recipe, {
            "max_new_tokens": limit, "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
            "repetition_penalty": body.repetition_penalty, "seed": seed, "num_beams": 1, "length_penalty": 1.0,
        })  # fmt: skip
        return [
            Text(prompt, config, model, number, self.top(body), stream=body.stream or bool(body.stops))
            for number in range(body.n)
        ]

    def _limit(self, body: GenerationBody, prompt: list[int]) -> int:
        context, most = context_length(self.service.run.model), self.service.limits.tokens
        room = most if context is None else context - len(prompt)
        if not prompt or room < 1:
            what = "is empty" if not prompt else f"has {len(prompt)} tokens, and the model reads {context}"
            raise RequestError(f"the prompt {what}", code="context_length_exceeded" if prompt else "invalid_value")
        wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if wanted is not None and (wanted > room or wanted > most):
            raise RequestError(
                f"max_tokens: at most {min(room, most)} after this prompt, found {wanted}", param="max_tokens",
                code="context_length_exceeded" if wanted > room else "invalid_value",
            )  # fmt: skip
        return wanted or min(room, most)

    async def _whole(self, text: Text, stream: TextStream) -> list[Piece]:
        async with contextlib.aclosing(self.service.write(text)) as pieces:
            if not stream.stops:  # nothing in the text can end it
                return stream.read_all([piece async for piece in pieces])
            return [piece async for piece, _ in read_text(stream, pieces)]

    async def _unless_gone(self, request: Request, writing: Any) -> Any:
        """What is written, unless the client leaves meanwhile."""
        writer = asyncio.ensure_future(writing)
        try:
            while True:
                done, _ = await asyncio.wait({writer}, timeout=0.5)
                if done:
                    return writer.result()
                if await request.is_disconnected():
                    raise RequestError("the client has left", status=499)
        finally:
            writer.cancel()

    async def _events(
        self,
        request: Request,
        body: GenerationBody,
        choices: list[Text],
        about: Mapping[str, Any],
        usage: dict[str, int],
    ) -> AsyncIterator[str]:
        """Server-sent events: a chunk for every piece of a choice, then the usage if it is asked for, then [DONE]."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        written = 0

        async def follow(number: int, text: Text) -> None:
            stream = TextStream(self.service.run.tokenizer, body.stops)
            try:
                async with contextlib.aclosing(self.service.write(text)) as pieces:
                    async for piece, new in read_text(stream, pieces):
                        queue.put_nowait((number, piece, new, stream.finish))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        writers = [asyncio.create_task(follow(number, text)) for number, text in enumerate(choices)]
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        extra = {"usage": None} if with_usage else {}
        try:
            for number in range(len(choices)):
                first = self.first_chunk(number)
                if first is not None:
                    yield _event({**about, "object": self.chunk_object, "choices": [first], **extra})
            ended = 0
            while ended < len(choices):
                item = await queue.get()
                if item is None:
                    ended += 1
                    continue
                if isinstance(item, Exception):
                    yield _event(_as_error(item).body())
                    return
                number, piece, new, finish = item
                written += 1
                chunk = self.chunk(number, new, finish, self._logprobs([piece]), body)
                yield _event({**about, "object": self.chunk_object, "choices": [chunk], **extra})
            self._count(request, usage, written)
            if with_usage:
                yield _event({**about, "object": self.chunk_object, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            for writer in writers:
                writer.cancel()
            for text in choices:
                text.cancelled.set()

    def _count(self, request: Request, usage: dict[str, int], written: int) -> None:
        usage |= {"completion_tokens": written, "total_tokens": usage["prompt_tokens"] + written}
        request.state.record |= {"usage": {"prompt": usage["prompt_tokens"], "completion": written}}

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Tokens with their log-probabilities; none where these were not asked for."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.service.run.tokenizer.decode([token])
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        return [
            {**entry(piece.token, piece.logprob), "top_logprobs": [entry(*one) for one in piece.top]}
            for piece in pieces
            if piece.logprob is not None
        ]

    @abstractmethod
    def top(self, body: Any) -> int | None:
        """How many likely tokens are reported at each place; None for no log-probabilities."""

    @abstractmethod
    def choice(self, number: int, text: str, finish: str | None, logprobs: list[Any], body: Any) -> dict[str, Any]:
        """A whole answer."""

    def first_chunk(self, number: int) -> dict[str, Any] | None:
        """What a stream begins with."""
        return None

    @abstractmethod
    def chunk(self, number: int, text: str, finish: str | None, logprobs: list[Any], body: Any) -> dict[str, Any]:
        """A part of an answer."""


@ROUTES.register("chat_completions")
class ChatCompletions(Generation):
    """Answers a conversation through the run's chat template."""

    path: ClassVar[str] = "/v1/chat/completions"
    id_prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    async def answer(self, request: Request) -> Response:
        body = await read(request, ChatBody)
        run, turns = self.service.run, [message.turn() for message in body.messages]
        messages = as_prompt(turns, run.recipe)
        if body.tools:
            template = str(run.tokenizer.chat_template)
            if "tools" not in template:
                raise RequestError("tools: the model's chat template has no place for them", param="tools")
            rendered = chat_template.render(run.tokenizer, messages, generate=True, tools=body.tools)  # type: ignore[arg-type]
            prompt = run.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            prompt = encode(run.tokenizer, messages)
        return await self.run(request, body, prompt, [turn["content"] for turn in turns])

    def top(self, body: ChatBody) -> int | None:
        return body.top_logprobs if body.logprobs else None

    def choice(self, number: int, text: str, finish: str | None, logprobs: list[Any], body: ChatBody) -> dict[str, Any]:
        return {
            "index": number, "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish, "logprobs": {"content": logprobs, "refusal": None} if body.logprobs else None,
        }  # fmt: skip

    def first_chunk(self, number: int) -> dict[str, Any]:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}

    def chunk(self, number: int, text: str, finish: str | None, logprobs: list[Any], body: ChatBody) -> dict[str, Any]:
        return {
            "index": number, "delta": {"content": text} if text else {}, "finish_reason": finish,
            "logprobs": {"content": logprobs, "refusal": None} if body.logprobs else None,
        }  # fmt: skip


@ROUTES.register("completions")
class Completions(Generation):
    """Continues a text."""

    path: ClassVar[str] = "/v1/completions"
    id_prefix: ClassVar[str] = "cmpl"
    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    async def answer(self, request: Request) -> Response:
        body = await read(request, CompletionBody)
        return await self.run(request, body, encode(self.service.run.tokenizer, body.prompt), [body.prompt])

    def top(self, body: CompletionBody) -> int | None:
        return body.logprobs

    def choice(
        self, number: int, text: str, finish: str | None, logprobs: list[Any], body: CompletionBody
    ) -> dict[str, Any]:
        return {"index": number, "text": text, "finish_reason": finish, "logprobs": _legacy(logprobs, body)}

    def chunk(
        self, number: int, text: str, finish: str | None, logprobs: list[Any], body: CompletionBody
    ) -> dict[str, Any]:
        return self.choice(number, text, finish, logprobs, body)


def _legacy(logprobs: Sequence[Mapping[str, Any]], body: CompletionBody) -> dict[str, Any] | None:
    """Log-probabilities in the older form of /v1/completions."""
    if body.logprobs is None:
        return None
    offsets, place = [], 0
    for one in logprobs:
        offsets.append(place)
        place += len(one["token"])
    return {
        "tokens": [one["token"] for one in logprobs], "token_logprobs": [one["logprob"] for one in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in logprobs],
        "text_offset": offsets,
    }  # fmt: skip


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _as_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    shown = str(error)[:500] if isinstance(error, PeftkitError) else "the server failed on this request"
    return RequestError(shown, status=500)
