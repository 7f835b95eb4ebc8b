"""Runs a GGUF file in llama.cpp in a process of its own, and writes what it answered.

    python -I llama_worker.py FOLDER    # which holds job.json

peftkit is not imported: what this file does, any user of the file can do. llama.cpp's own server is started on the
loopback, and asked for token ids, rendered conversations, greedy continuations with log probabilities, and stops.
"""

import json
import os
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def start(job):
    """llama.cpp's server with the model, and the adapter if there is one."""
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.warmup = False
    params.use_jinja = True
    params.verbosity = 1  # warnings and errors, of which the last one is quoted
    params.port = 0
    if job["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["adapter"], 1.0
        params.lora_adapters = [adapter]
    return xllamacpp.Server(params)


def ask(server, path, body):
    """The server's answer to a request."""
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as reply:
        return json.loads(reply.read().decode("utf-8", "replace"))


def tokenize(server, text):
    """Token ids as the server gives them to the model."""
    return ask(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def render(server, messages):
    """A conversation as the model's own template renders it, and its token ids."""
    text = ask(server, "/apply-template", {"messages": messages, "add_generation_prompt": True})["prompt"]
    return {"text": text, "ids": tokenize(server, text)}


def complete(server, prompt, tokens, job, **options):
    """The server's greedy completion of token ids."""
    return ask(server, "/completion", {
        "prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": job["alternatives"], "return_tokens": True,
        "samplers": ["temperature"], **options,
    })  # fmt: skip


def continuation(server, prompt, job):
    """The likeliest next tokens, and the log probabilities of the likeliest alternatives at each."""
    answer = complete(server, prompt, job["new_tokens"], job, cache_prompt=False)
    ids, places = answer["tokens"], answer["completion_probabilities"]
    if len(places) != len(ids):  # none are reported for a token that ends within a character: ask for each by itself
        plain = [[job["plain_token"], 1e6]]  # chosen in its place; the probabilities are those before the bias
        places = [
            complete(server, prompt + ids[:place], 1, job, logit_bias=plain)["completion_probabilities"][0]
            for place in range(len(ids))
        ]
    alternatives = [[(one["id"], one["logprob"]) for one in place["top_logprobs"]] for place in places]
    return {"ids": ids, "alternatives": alternatives}


def stops(server, prompt, token):
    """Whether the model ends its answer with a token, which is made certain by its bias."""
    answer = ask(server, "/completion", {
        "prompt": prompt, "n_predict": 4, "temperature": 0, "logit_bias": [[token, 1e6]], "cache_prompt": False,
    })  # fmt: skip
    return answer["stop_type"] == "eos"


def main():
    """Reads job.json; writes answers.json next to it."""
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    server = start(job)
    answers = {
        "texts": [tokenize(server, text) for text in job["texts"]],
        "conversations": [render(server, messages) for messages in job["conversations"]],
        "continuations": [continuation(server, prompt, job) for prompt in job["prompts"]],
        "stops": [stops(server, job["prompts"][0], token) for token in job["stops"]],
        "versions": {name: version(name) for name in ("xllamacpp", "gguf")},
    }
    (work / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the server's threads are not waited for


if __name__ == "__main__":
    main()
