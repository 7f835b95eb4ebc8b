"""Loads an export with plain peft and transformers, in a process of its own, and writes the logits that it gives.

    python -I verify_worker.py FOLDER    # holding job.json and inputs.safetensors

Nothing of peftkit is imported: what this file can do, any reader of the model card can do. Bottleneck adapters alone,
of which peft knows nothing, are put on the base by peftkit.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def load(job):
    """The exported model as the card says to load it."""
    dtype = getattr(torch, job["held"])
    auto = getattr(transformers, job["auto_class"])
    if job["saves"] == "model":
        return auto.from_pretrained(job["folder"], dtype=dtype)
    arguments = {"config": transformers.AutoConfig.from_pretrained(job["folder"])}
    if job["revision"]:
        arguments["revision"] = job["revision"]
    if job["quantization"]:
        if "checkpoint" not in job["quantization"]:  # a checkpoint of quantized weights says itself how to read them
            arguments["quantization_config"] = transformers.BitsAndBytesConfig(**job["quantization"])
        arguments["device_map"] = {"": job["device"]}
    base = auto.from_pretrained(job["base"], dtype=dtype, ignore_mismatched_sizes=True, **arguments)
    if "checkpoint" in (job["quantization"] or {}):
        hold(base, dtype)
    for name, module in base.named_modules():
        if name.split(".")[-1] in job["heads"]:
            module.float()  # heads were trained in fp32; in half precision they would be rounded on loading
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the same kernels as in training
        if getattr(module, "linear_mode", "") is None:
            module.linear_mode = "train"  # and of gptqmodel's layers
    kind = json.loads((Path(job["folder"]) / "adapter_config.json").read_text(encoding="utf-8")).get("type")
    if kind == "bitfit":
        base.load_state_dict(load_file(Path(job["folder"]) / "adapter_model.safetensors"), strict=False, assign=True)
        return base
    if kind == "bottleneck":
        from peftkit.export.own_format import put_on

        return put_on(base, Path(job["folder"]))
    from peft import PeftModel

    return PeftModel.from_pretrained(base, job["folder"])


def hold(base, dtype):
    """Whole weights of a quantized checkpoint in one dtype: transformers leaves some as the files have them."""
    for parameter in base.parameters():
        packed = hasattr(parameter, "quant_state") or type(parameter.data) is not torch.Tensor
        if parameter.is_floating_point() and not packed:
            parameter.data = parameter.data.to(dtype)


def logits(model, inputs, pooling):
    """[rows, labels] of a classifier, [tokens, vocabulary] of a language model."""
    scores = model(**inputs).logits.float()
    mask = inputs["attention_mask"]
    if pooling == "mean":
        weights = mask.unsqueeze(-1)
        return (scores * weights).sum(1) / weights.sum(1)
    if pooling == "cls":
        return scores[torch.arange(len(scores)), mask.int().argmax(1)]
    # logits of a learned prompt stand before those of the row's own tokens
    return scores if scores.dim() == 2 else scores[:, -mask.shape[1] :][mask.bool()]


def main():
    """Reads the job, writes logits.safetensors and versions.json beside it."""
    work = Path(sys.argv[1])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = load(job).eval()
    if not job["quantization"]:
        model = model.to(job["device"], dtype=getattr(torch, job["dtype"]))
    inputs = {name: tensor.to(job["device"]) for name, tensor in load_file(work / "inputs.safetensors").items()}
    dtype = getattr(torch, job["dtype"])
    with torch.no_grad(), torch.autocast(job["device"], dtype=dtype, enabled=dtype != torch.float32):
        found = logits(model, inputs, job["pooling"])
    save_file({"logits": found.cpu().contiguous()}, work / "logits.safetensors")
    names = ("torch", "transformers", "peft")
    (work / "versions.json").write_text(json.dumps({name: version(name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
