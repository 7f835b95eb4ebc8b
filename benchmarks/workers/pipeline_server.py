"""The peer: transformers' text-classification pipeline behind the same kind of server, one request after the other.

python benchmarks/workers/pipeline_server.py --model FOLDER --adapter FOLDER --labels A,B --port 8000
"""

from __future__ import annotations

import argparse
import threading
from typing import Any


def application(classify: Any, max_length: int) -> Any:
    """Starlette's application around a pipeline, which one thread uses at a time."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    lock = threading.Lock()

    def label_of(text: str) -> list[dict[str, Any]]:
        with lock:
            return list(classify(text, truncation=True, max_length=max_length))

    async def answer(request: Request) -> JSONResponse:
        found = await run_in_threadpool(label_of, (await request.json())["input"])
        return JSONResponse({"data": [{"label": found[0]["label"], "probability": found[0]["score"]}]})

    async def ready(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    return Starlette(routes=[Route("/v1/classify", answer, methods=["POST"]), Route("/readyz", ready)])


def main() -> None:
    """Loads base, adapter and tokenizer, and answers until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--labels", required=True, help="names by id, comma-separated")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    import uvicorn
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    names = args.labels.split(",")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(names))
    model = PeftModel.from_pretrained(base, args.adapter)
    model.config.id2label = dict(enumerate(names))
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    app = application(classify, args.max_length)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
