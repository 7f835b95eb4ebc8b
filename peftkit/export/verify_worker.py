"""Loads an export with plain peft and transformers in a process of its own, and writes its logits.

    python -I verify_worker.py FOLDER    # which holds job.json and inputs.safetensors

peftkit is not imported: what this file can do, any reader of the model card can do. Three exceptions: bottleneck
adapters, which peft lacks; formats of other exporters, which are loaded by the function that their job names; and 4-bit
weights of widths that bitsandbytes unpacks wrongly on processors with AVX512.
"""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def load(job):
    """The exported model, loaded as its card says."""
    folder = Path(job["folder"])
    if job.get("loader"):
        sys.path[:0] = job["import_path"]
        module, _, function = job["loader"].partition(":")
        return getattr(importlib.import_module(module), function)(folder)
    model = load_transformers(job, folder).eval()
    return model if job["quantization"] else model.to(job["device"], dtype=getattr(torch, job["dtype"]))


def load_transformers(job, folder):
    """A model, or a base with its adapter."""
    dtype = getattr(torch, job["weights_dtype"])
    auto = getattr(transformers, job["auto_class"])
    if job["saves"] == "model":
        return auto.from_pretrained(folder, dtype=dtype)
    base = load_base(job, auto, dtype)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not config["peft_type"].startswith("PEFTKIT_"):
        from peft import PeftModel

        return PeftModel.from_pretrained(base, folder)
    if config["adapters"]:
        sys.path[:0] = job["import_path"]
        from peftkit.export.native_adapters import load_onto

        return load_onto(base, folder)
    base.load_state_dict(load_file(folder / "adapter_model.safetensors"), strict=False, assign=True)
    base.tie_weights()  # assigned tensors replace parameters that others may share
    return base


def load_base(job, auto, dtype):
    """The base in the precision in which the adapter was trained over it."""
    own = (Path(job["folder"]) / "config.json").is_file()
    arguments = {"config": transformers.AutoConfig.from_pretrained(job["folder"] if own else job["base"])}
    if job["revision"]:
        arguments["revision"] = job["revision"]
    quantization = job["quantization"] or {}
    if quantization:
        arguments["device_map"] = {"": job["device"]}
        if "checkpoint" not in quantization:  # a quantized checkpoint holds its own configuration
            arguments["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    base = auto.from_pretrained(job["base"], dtype=dtype, ignore_mismatched_sizes=True, **arguments)
    if any(is_cut(module) for module in base.modules()):
        sys.path[:0] = job["import_path"]
        from peftkit.models.third_party import import_bitsandbytes

        import_bitsandbytes()  # which mends it
    if "checkpoint" in quantization:
        cast_unpacked(base, dtype)
    for name, module in base.named_modules():
        if any(f".{name}".endswith(f".{head}") for head in job["heads"]):
            module.float()  # heads were trained in fp32; in half precision they would be rounded on loading
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the same kernels as in training
        if getattr(module, "linear_mode", "") is None:
            module.linear_mode = "train"  # also for gptqmodel's layers
    return base


def is_cut(module):
    """Whether a 4-bit layer has blocks of weights that begin in one row and end in the next."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    blocksize = getattr(state, "blocksize", None)
    return blocksize is not None and module.in_features % blocksize != 0


def cast_unpacked(base, dtype):
    """Casts the unquantized weights of a quantized checkpoint; transformers leaves some in the dtype of their file."""
    for parameter in base.parameters():
        packed = hasattr(parameter, "quant_state") or type(parameter.data) is not torch.Tensor
        if parameter.is_floating_point() and not packed:
            parameter.data = parameter.data.to(dtype)


def logits(model, inputs, pooling):
    """[rows, labels] of a classifier, [rows, width] of an embedding model, [tokens, vocabulary] of a language model.

    Of a model for questions [tokens, 2], of the first and the last token of an answer.
    """
    outputs = model(**inputs)
    if hasattr(outputs, "start_logits"):
        scores = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).float()
    else:
        scores = torch.as_tensor(outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).float()
    mask = inputs["labels"] != -100 if "labels" in inputs else inputs["attention_mask"]
    if scores.dim() == 2:
        return scores
    if pooling == "mean":
        weights = mask.unsqueeze(-1)
        return (scores * weights).sum(1) / weights.sum(1)
    if pooling == "cls":
        return scores[torch.arange(len(scores)), mask.int().argmax(1)]
    if pooling == "last":
        return scores[torch.arange(len(scores)), (torch.arange(mask.shape[1]) * mask).argmax(1)]
    # the logits of a learned prompt come before those of the row's own tokens
    return scores[:, -mask.shape[1] :][mask.bool()]


def main():
    """Reads the job; writes logits.safetensors and versions.json next to it."""
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = load(job)
    inputs = {name: tensor.to(job["device"]) for name, tensor in load_file(work / "inputs.safetensors").items()}
    dtype = getattr(torch, job["dtype"])
    with torch.no_grad(), torch.autocast(job["device"], dtype=dtype, enabled=dtype != torch.float32):
        outputs = logits(model, inputs, job["pooling"])
    save_file({"logits": outputs.cpu().contiguous()}, work / "logits.safetensors")
    names = ("torch", "transformers", "peft")
    (work / "versions.json").write_text(json.dumps({name: version(name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
