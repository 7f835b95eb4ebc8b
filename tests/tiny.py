"""Tiny models, made in a second and saved as complete model folders: what a test loads in place of a real base.

    folder = tiny_bert(tmp_path / "bert")
    AutoModelForSequenceClassification.from_pretrained(folder)

Weights are seeded; hidden size 32, 2 layers, 4 heads, some 300 tokens. Their logits spread well beyond rounding, so
that two models that differ can be told apart.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXT = (
    "the a of and to in is was for on that with as it at by from this be are has have an not they which or but their "
    "world sports business science game team player match market stock bank money price oil computer software space "
    "good bad great terrible movie film plot actor love hate happy sad fine awful best worst red green blue king lord "
    "day night said new first last year one two three hello what who how why yes no please thank you"
)
WORDS = _TEXT.split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_tokenizer(folder: str | Path, kind: str = "wordpiece") -> Path:
    """Saves a tokenizer: "wordpiece" (BERT), "distilbert" (the same without token types), "roberta" (byte-level BPE
    with <s>), "gpt2" (byte-level BPE, one special token) or "chatml" (byte-level BPE with a ChatML template)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _fast_tokenizer(kind).save_pretrained(folder)
    return folder


def tiny_bert(folder: str | Path, **config: Any) -> Path:
    """A BERT encoder without a head."""
    from transformers import BertConfig, BertModel

    return _save(folder, "wordpiece", BertConfig, BertModel, {**_SIZES, "max_position_embeddings": 128, **config})


def tiny_distilbert(folder: str | Path, **config: Any) -> Path:
    """A DistilBERT encoder without a head."""
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 128}
    return _save(folder, "distilbert", DistilBertConfig, DistilBertModel, {**sizes, **config})


def tiny_roberta(folder: str | Path, **config: Any) -> Path:
    """A RoBERTa encoder without a head (its positions start after the pad token's id)."""
    from transformers import RobertaConfig, RobertaModel

    sizes = {**_SIZES, "max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0}
    return _save(folder, "roberta", RobertaConfig, RobertaModel, {**sizes, "eos_token_id": 2, **config})


def tiny_gpt2(folder: str | Path, **config: Any) -> Path:
    """A GPT-2 decoder: Conv1D layers, tied head, no pad token and no chat template, like the original."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
    return _save(folder, "gpt2", GPT2Config, GPT2LMHeadModel, {**sizes, **config})


def tiny_llama(folder: str | Path, **config: Any) -> Path:
    """A Llama decoder with grouped-query attention, a ChatML template, and <|endoftext|> beside its stop token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    return _save(folder, "chatml", LlamaConfig, LlamaForCausalLM, {**sizes, "tie_word_embeddings": True, **config})


def tiny_t5(folder: str | Path, **config: Any) -> Path:
    """A T5 encoder–decoder: relative positions, a tied output layer that reads scaled hidden states."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    special = {"pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 1.0}
    return _save(folder, "t5", T5Config, T5ForConditionalGeneration, {**sizes, **special, **config})


def tiny_mt5(folder: str | Path, **config: Any) -> Path:
    """An mT5 encoder–decoder: as T5, with a gated feed-forward layer and an output layer of its own."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    special = {"pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    return _save(folder, "t5", MT5Config, MT5ForConditionalGeneration, {**sizes, **special, **config})


def tiny_bart(folder: str | Path, **config: Any) -> Path:
    """A BART encoder–decoder: learned positions, a bias on the logits, and a decoder that starts at </s>."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.2,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "max_position_embeddings": 128}  # fmt: skip
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return _save(folder, "roberta", BartConfig, BartForConditionalGeneration,
                 {**sizes, **special, "forced_bos_token_id": 0, "forced_eos_token_id": None, **config})  # fmt: skip


def tiny_mbart(folder: str | Path, **config: Any) -> Path:
    """An mBART encoder–decoder: texts end with the code of their language, which the decoder starts with."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.2,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "max_position_embeddings": 128}  # fmt: skip
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 5}
    return _save(folder, "mbart", MBartConfig, MBartForConditionalGeneration,
                 {**sizes, **special, "forced_eos_token_id": None, **config})  # fmt: skip


def tiny_pegasus(folder: str | Path, **config: Any) -> Path:
    """A Pegasus encoder–decoder: sinusoidal positions, and a decoder that starts at the padding token."""
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.2,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "max_position_embeddings": 128}  # fmt: skip
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return _save(folder, "t5", PegasusConfig, PegasusForConditionalGeneration, {**sizes, **special, **config})


def tiny_recipe(folder: str | Path, **parts: Any) -> Any:
    """A recipe on a model folder, in fp32 and without tracking; parts are merged over it."""
    from peftkit.schema.recipe import Recipe, replace

    base = {"name": "tiny", "model": {"source": str(folder), "dtype": "float32"}, "data": {"source": "none.csv"}}
    return replace(Recipe.parse({**base, "tracking": []}), **parts)


def scale_bytes(model: Any) -> int:
    """Bytes of what bitsandbytes keeps beside the weights that it has quantized."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    found = []
    for layer in model.modules():
        if type(layer) is Linear4bit:
            state = layer.weight.quant_state
            found += [state.absmax, state.code]
            found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        elif type(layer) is Linear8bitLt:  # the weight hands its scales over when the layer first runs
            found.append(layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB)
    return sum(tensor.nbytes for tensor in found)


def add_pooling(folder: str | Path, mode: str = "mean") -> Path:
    """Makes a folder look like a sentence encoder's: modules.json and 1_Pooling/config.json with "mean" or "cls"."""
    folder = Path(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {"pooling_mode_cls_token": mode == "cls", "pooling_mode_mean_tokens": mode == "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags), encoding="utf-8")
    return folder


def _save(folder: str | Path, tokenizer: str, config_class: Any, model_class: Any, sizes: dict[str, Any]) -> Path:
    """Seeds torch without disturbing the test's own generator, and saves model and tokenizer."""
    import torch

    folder = tiny_tokenizer(folder, tokenizer)
    sizes = {"vocab_size": len(_fast_tokenizer(tokenizer)), "initializer_range": 0.2, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = model_class(config_class(**sizes))
    model.eval().save_pretrained(folder)
    return folder


@functools.cache
def _fast_tokenizer(kind: str) -> Any:
    return _wordpiece(kind == "wordpiece") if kind in {"wordpiece", "distilbert"} else _byte_level(kind)


def _wordpiece(token_types: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *_LETTERS, *("##" + letter for letter in _LETTERS), *(w for w in WORDS if len(w) > 1)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=128, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )  # fmt: skip


def _byte_level(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "gpt2": ["<|endoftext|>"],
        "t5": ["<pad>", "</s>", "<unk>"],
        "mbart": ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "en_XX"],
        "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 60, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    named = {
        "roberta": {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
                    "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
        "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "mbart": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
                  "mask_token": "<mask>", "additional_special_tokens": ["en_XX"]},
        "chatml": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML,
                   "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    }[kind]  # fmt: skip
    if kind == "t5":
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if kind == "mbart":
        language = [("</s>", 2), ("en_XX", 5)]
        backend.post_processor = processors.TemplateProcessing(single="$A </s> en_XX", special_tokens=language)
    if kind == "roberta":
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=128 if kind == "roberta" else 256,
        model_input_names=["input_ids", "attention_mask"], **named,
    )  # fmt: skip
