"""Finetuning methods: one file per family, which registers itself under its ``kind``.

Importing any module here must be cheap, because the registry imports them all to list the methods: torch, peft and
transformers are imported inside functions. What methods share: ``targets`` (base classes, selection of modules),
``prompt_methods``, ``loftq_init`` and ``eva_init`` (starts of LoRA), ``table`` (the methods as a table).
"""
