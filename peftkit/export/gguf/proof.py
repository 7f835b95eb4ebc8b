"""The proof of a GGUF file: llama.cpp, in a fresh process, reads and answers prompts like the trained model.

Token ids of texts and of rendered conversations must be the same, and every stop token must end an answer. llama.cpp
continues some prompts greedily; the trained model reads the same tokens, so that its choice and its distribution are
compared at every one of them. The Kullback–Leibler divergence is taken over llama.cpp's likeliest tokens and one class
of all others, which is at most that over the whole vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import ExportError, ModelError
from peftkit.evaluation import generation
from peftkit.export.gguf import vocabulary
from peftkit.export.proof import FILE
from peftkit.models import chat_template

WORKER = Path(__file__).with_name("llama_worker.py")
MINUTES = 60
NEW_TOKENS, ALTERNATIVES, CONTEXT = 24, 512, 1024
MAX_KL = {"f32": 1e-3, "f16": 1e-3, "bf16": 2e-2, "q8_0": 5e-2, "q4_0": 1.0, "q4_k_m": 0.5}
"""Mean divergence (nats per token) above which a file is refused: more than rounding to the type explains."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX, isn't it? I'll say: we've 3.14159 of 2,718,281 (50 %).",
    "  two leading spaces, a tab\tand   three spaces\n\nan empty line\r\n\r\nWindows' ends   \n",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # code\n",
    "Zürich, façade, naïve, Ωμέγα, Привет мир, שלום, مرحبا, नमस्ते",
    "你好,世界。こんにちは 안녕하세요 ๆไทย",
    "🙂👩‍👩‍👧‍👦 e\u0301 \u00a0 \u200b …“quotes”—dashes",
    "?",
    "12345678901234567890 1 22 333 4444 55555",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org",
)
"""Texts whose token ids are compared."""
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time",
    "Question: What is the capital of France?\nAnswer:",
    "1, 2, 3, 4,",
)
COMPOSED = "; the tokenizer composes letters and accents (NFC), and llama.cpp does not: send it composed texts"
_USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = (
    [_USER],
    [{"role": "system", "content": "You answer in one word."}, _USER],
    [_USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": 'And "Zürich"?\n\n- {{ x }} <b>'}],
)


@dataclass(frozen=True)
class GGUFProof:
    """The contents of proof.json."""

    passed: bool
    summary: str
    """What was compared and how it came out, for reports and the card."""
    file_type: str
    texts: int
    same_token_ids: int
    """Texts with the trained model's token ids."""
    conversations: int
    same_template: int
    """Conversations rendered as the trained model's tokenizer does, to the same token ids."""
    stops: int
    stopping: int
    """Stop tokens that end an answer."""
    prompts: int
    same_continuation: int
    """Prompts at which the trained model would have chosen every token of llama.cpp's continuation."""
    tokens: int
    same_choice: float
    """Share of tokens that the trained model would have chosen, too."""
    kl: float
    """Mean divergence of llama.cpp's next-token distribution from the trained model's, in nats per token."""
    max_kl: float
    """Mean divergence that is allowed."""
    problem: str
    """The first difference that is not allowed; empty if there is none."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, what: str) -> None:
        """Raises ExportError unless the proof passed."""
        if not self.passed:
            raise ExportError(f"{what}: {self.problem}")


@dataclass(frozen=True)
class Reference:
    """What the trained model does."""

    model: Any
    tokenizer: Any
    context: int
    """Tokens up to which llama.cpp computes as transformers does."""

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """Those that the chat template takes; none without a template."""
        if not self.tokenizer.chat_template:
            return []
        usable = []
        for messages in CONVERSATIONS:
            try:
                chat_template.render(self.tokenizer, messages, generate=True)
            except ModelError:  # it takes no system prompt, for example
                continue
            usable.append([dict(message) for message in messages])
        return usable

    def prompts(self) -> list[list[int]]:
        """Token ids of texts and conversations to continue."""
        asked: list[Any] = [*PROMPTS, *self.conversations]
        return [generation.encode(self.tokenizer, prompt) for prompt in asked]

    @torch.no_grad()
    def log_probabilities(self, prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """[tokens of the continuation, vocabulary], each after the tokens before it."""
        ids = torch.tensor([[*prompt, *continuation]])
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].double()
        return logits[-len(continuation) - 1 : -1].log_softmax(-1)


def need_runtime() -> None:
    """Raises ModelError if llama.cpp's Python bindings are not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ModelError(
            "the proof of a GGUF file runs it in llama.cpp: run `pip install xllamacpp`, or export without a proof: "
            "prove=false"
        )


def prove(
    reference: Reference, model: Path, file_type: str, *, adapter: Path | None = None, max_kl: float | None = None,
    prompts: Sequence[Sequence[int]] | None = None, new_tokens: int = NEW_TOKENS,
) -> GGUFProof:  # fmt: skip
    """Compares a GGUF file in llama.cpp with the trained model.

    Args:
        reference: the trained model, merged, in fp32 on the CPU.
        adapter: a GGUF adapter to load over the file.
        max_kl: allowed divergence; None takes that of the type.
        prompts: token ids to continue; None takes a few texts and conversations.
        new_tokens: length of a continuation.

    Raises:
        ExportError: llama.cpp could not load the file.
    """
    tokenizer = reference.tokenizer
    prompts = reference.prompts() if prompts is None else prompts
    length = max(len(ids) for ids in prompts) + new_tokens + 8
    conversations, stops = reference.conversations, vocabulary.stop_ids(reference.model, tokenizer)
    rows = reference.model.get_input_embeddings().weight.shape[0]
    texts = compared_texts(tokenizer)
    answers = _run(
        {
            "model": str(model.resolve()),
            "adapter": str(adapter.resolve()) if adapter else None,
            "context": min(max(length, CONTEXT), reference.context),
            "threads": torch.get_num_threads(),
            "texts": texts,
            "conversations": conversations,
            "prompts": [list(ids) for ids in prompts],
            "new_tokens": new_tokens,
            "alternatives": min(rows, ALTERNATIVES),
            "stops": stops,
            "plain_token": tokenizer("a", add_special_tokens=False)["input_ids"][-1],
        }
    )
    problems = [
        *_token_problems(tokenizer, answers["texts"]),
        *_template_problems(tokenizer, conversations, answers["conversations"]),
        *_stop_problems(tokenizer, stops, answers["stops"]),
    ]
    same, divergences, whole = _compare(reference, prompts, answers["continuations"])
    kl, allowed = sum(divergences) / len(divergences), MAX_KL[file_type] if max_kl is None else max_kl
    if not kl <= allowed:
        problems.append((
            "kl", f"its next-token distributions differ from the trained model's by {kl:.2g} nats per token; "
            f"{allowed:g} are allowed for {file_type}",
        ))  # fmt: skip
    failed = [kind for kind, _ in problems]
    counts: dict[str, Any] = {
        "texts": len(texts),
        "same_token_ids": len(texts) - failed.count("tokens"),
        "conversations": len(conversations),
        "same_template": len(conversations) - failed.count("template"),
        "stops": len(stops),
        "stopping": len(stops) - failed.count("stop"),
        "prompts": len(prompts),
        "same_continuation": whole,
        "tokens": len(same),
        "same_choice": sum(same) / len(same),
        "kl": kl,
        "max_kl": allowed,
    }
    return GGUFProof(
        passed=not problems,
        summary=_summary(counts) + (COMPOSED if vocabulary.composes(tokenizer) else ""),
        file_type=file_type,
        problem=problems[0][1] if problems else "",
        versions=answers["versions"],
        **counts,
    )


def compared_texts(tokenizer: Any) -> list[str]:
    """Texts whose token ids must agree; composed (NFC) where the tokenizer does that, which llama.cpp does not."""
    composed = vocabulary.composes(tokenizer)
    return [unicodedata.normalize("NFC", text) if composed else text for text in TEXTS]


def _summary(counts: dict[str, Any]) -> str:
    return (
        "llama.cpp gives the trained model's token ids for {same_token_ids} of {texts} texts and {same_template} of "
        "{conversations} conversations, stops at {stopping} of {stops} stop tokens, and chose the trained model's "
        "token in {same} of {tokens} places, with a mean divergence of {kl:.2g} nats per token ({max_kl:g} allowed)"
    ).format(**counts, same=round(counts["same_choice"] * counts["tokens"]))


def _token_problems(tokenizer: Any, ids: Sequence[list[int]]) -> list[tuple[str, str]]:
    problems = []
    for text, theirs in zip(compared_texts(tokenizer), ids, strict=True):
        ours = generation.encode(tokenizer, text)
        if theirs != ours:
            problems.append(
                ("tokens", f"llama.cpp reads {text!r} as other tokens: {_difference(tokenizer, ours, theirs)}")
            )
    return problems


def _template_problems(
    tokenizer: Any, conversations: Sequence[list[dict[str, str]]], rendered: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    problems = []
    for messages, theirs in zip(conversations, rendered, strict=True):
        text = chat_template.render(tokenizer, messages, generate=True)
        ours = generation.encode(tokenizer, messages)
        if theirs["ids"] != ours:
            shown = _difference(tokenizer, ours, theirs["ids"])
            wrong = "renders" if theirs["text"] not in (text, text.removeprefix(str(tokenizer.bos_token))) else "reads"
            problems.append(
                ("template", f"llama.cpp {wrong} a conversation of {len(messages)} turns otherwise: {shown}")
            )
    return problems


def _difference(tokenizer: Any, ours: list[int], theirs: list[int]) -> str:
    """The tokens of both where they first differ."""
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    shown = [tokenizer.convert_ids_to_tokens(ids[place : place + 4]) for ids in (ours, theirs)]
    return f"from token {place + 1} on {shown[1]}, where training had {shown[0]}"


def _stop_problems(tokenizer: Any, stops: Sequence[int], stopped: Sequence[bool]) -> list[tuple[str, str]]:
    return [
        ("stop", f"llama.cpp does not stop at {tokenizer.convert_ids_to_tokens(token)}, which ends an answer")
        for token, ended in zip(stops, stopped, strict=True)
        if not ended
    ]


def _compare(
    reference: Reference, prompts: Sequence[Sequence[int]], continuations: Sequence[dict[str, Any]]
) -> tuple[list[bool], list[float], int]:
    """(same choice, divergence) of every token, and how many continuations agree from beginning to end."""
    same: list[bool] = []
    divergences: list[float] = []
    whole = 0
    for prompt, theirs in zip(prompts, continuations, strict=True):
        ours = reference.log_probabilities(prompt, theirs["ids"])
        equal = (ours.argmax(-1) == torch.tensor(theirs["ids"])).tolist()
        divergences += [divergence(p, q) for p, q in zip(ours, theirs["alternatives"], strict=True)]
        same += equal
        whole += all(equal)
    return same, divergences, whole


def divergence(trained: torch.Tensor, alternatives: Sequence[tuple[int, float]]) -> float:
    """KL(trained ‖ exported) in nats over the alternatives' tokens and one class of all others.

    Args:
        trained: log probabilities [vocabulary].
        alternatives: (token, log probability) of the exported model's likeliest tokens.
    """
    tokens = torch.tensor([token for token, _ in alternatives])
    q = torch.tensor([value for _, value in alternatives], dtype=torch.float64)
    p = trained[tokens]
    kl = float((p.exp() * (p - q)).sum())
    rest_p, rest_q = (max(1.0 - float(one.exp().sum()), 0.0) for one in (p, q))
    if rest_p > 1e-9:
        kl += rest_p * float(torch.tensor(rest_p / max(rest_q, 1e-9)).log())
    return max(kl, 0.0)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="peftkit-gguf-") as name:
        work = Path(name)
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_"))}
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(WORKER), str(work)], env=environment, capture_output=True, text=True,
                errors="replace", timeout=60 * MINUTES, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ExportError(f"llama.cpp did not answer within {MINUTES} minutes") from None
        if not (work / "answers.json").is_file():
            raise ExportError(f"llama.cpp cannot run the file: {_reason(done.stderr)}")
        return json.loads((work / "answers.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _reason(log: str) -> str:
    """What a log says that failed: the first of llama.cpp's errors, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line]
    return errors[0][:300] if errors else lines[-1][:300] if lines else "no message"
