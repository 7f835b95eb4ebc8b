"""The recipe: one immutable, validated description of a whole run. Imports pydantic only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from peftkit.errors import RecipeError, did_you_mean
from peftkit.schema import recipe_yaml
from peftkit.schema.registries import BASELINES, METHODS, QUANTIZATIONS, TASKS, runtime_formats
from peftkit.schema.sections import ClassName, ConfigSection, DiscriminatedBy, NameIn
from peftkit.schema.validation import describe

Fraction = Annotated[float, Field(ge=0, lt=1)]
Rows = Annotated[int, Field(ge=1)]
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip

BOUND_TO_SOURCE = ("revision", "subset")


def _as_mode(value: Any) -> Any:
    """A switch may be written as a boolean."""
    return {True: "full", False: "off"}[value] if isinstance(value, bool) else value


def _as_offload(value: Any) -> Any:
    return {"to": value} if isinstance(value, str) else value


def _as_delimiter(value: Any) -> Any:
    return {"tab": "\t", "\\t": "\t"}.get(value, value) if isinstance(value, str) else value


def _known_encoding(value: str) -> str:
    try:
        "\n".encode(value)
    except (LookupError, UnicodeError):
        raise ValueError(
            f"unknown text encoding '{value}'; take one of Python's, such as utf-8, cp1252, gbk, shift_jis"
        ) from None
    return value


def _runs_without_torch(value: str) -> str:
    if value not in (names := runtime_formats()):
        raise ValueError(f"unknown backend '{value}': {did_you_mean(value, names)}")
    return value


class OffloadConfig(ConfigSection):
    """Where the frozen weights of a model's blocks are while they do not compute."""

    to: Literal["cpu", "disk"]
    """cpu: in the CPU's memory, for a GPU that is too small for the weights. disk: in the model's own files where the
    weights are used as stored, else in a file that is written once to the cache."""


class ModelConfig(ConfigSection):
    """The base model: where it comes from and how it is loaded."""

    source: str
    """Hub id, ./folder, file.gguf, package:NAME for a model inside an installed distribution, or a finished run's
    folder (run:PATH) for the model that it trained."""
    adapter: str | None = None
    """A finished run or a folder with an adapter, peftkit's or peft's, to start from; None starts with a new one."""
    adapter_use: Literal["continue", "merge"] | None = None
    """What to do with that adapter. continue: train it further, by the method that made it; merge: add it to the base's
    weights, and train any method on top."""
    revision: str | None = None
    """Hub commit, tag or branch; pin a commit to make a recipe reproducible."""
    pooling: Literal["auto", "own", "mean", "cls", "last"] = "auto"
    """How a classifier pools the tokens: the architecture's own way, their mean, or the first. auto: a sentence
    encoder's own pooling where the backbone is frozen or lightly tuned, else the architecture's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of frozen weights and matmuls; trained weights are always fp32. auto: bf16 where it is native."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto leaves the choice to transformers."""
    dropout: Fraction | None = None
    """Dropout rate in the base and its head; None keeps the base's own."""
    chat_template: str | None = None
    """A named chat template (chatml, llama2, zephyr, plain) for a base that has none."""
    offload: Annotated[OffloadConfig | None, BeforeValidator(_as_offload)] = None
    """Keep the frozen weights of blocks off the device: two blocks at a time are brought there, forward and backward.
    Results stay equal to the bit. Written as {to: disk}, or disk."""
    fold_system: bool = False
    """Put the system prompt at the start of the first user turn, a blank line between, for a chat template that takes
    none. Exported with the template."""

    @property
    def continues(self) -> bool:
        """Whether training begins with the weights of an existing adapter."""
        return self.adapter_use == "continue"

    @model_validator(mode="after")
    def _adapter_has_a_use(self) -> ModelConfig:
        if self.adapter is not None and self.adapter_use is None:
            raise ValueError(
                f"adapter={self.adapter}: choose what to do with it: adapter_use=continue trains the same adapter "
                "further, adapter_use=merge adds it to the base and trains a new one"
            )
        if self.adapter is None and self.adapter_use is not None:
            raise ValueError(f"adapter_use={self.adapter_use} needs model.adapter: name a run or an adapter's folder")
        return self


class CleaningConfig(ConfigSection):
    """How bad rows are handled. Each step is reported with counts and examples; 'error' stops before training."""

    empty: Literal["error", "drop"] = "error"
    """Rows whose text is empty, blank or null."""
    control_characters: Literal["strip", "report", "off"] = "strip"
    """Characters below U+0020 but tab and newline, U+007F, zero-width characters and stray byte-order marks."""
    duplicates: Literal["drop", "report", "off"] = "drop"
    """Equal rows of one split: the first one stays. Texts of classifiers are equal whatever their case and spaces;
    documents and conversations to the letter, system prompts included."""
    near_duplicates: Literal["drop", "report", "off"] = "report"
    """Training rows whose word 3-grams have an (estimated) Jaccard similarity above the threshold."""
    near_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Jaccard similarity from which two texts are near duplicates."""
    leakage: Literal["drop", "error", "report", "off"] = "drop"
    """Training rows that are equal to one of validation or test; validation rows equal to one of test."""
    conflicts: Literal["drop", "report", "off"] = "report"
    """Equal texts with different labels; drop removes all of them. Where most rows are such, report is an error."""
    null_words: Literal["drop", "error"] | None = None
    """Rows of a classifier or a regression whose text, label, or one of whose labels is only a word for a missing value
    (nan, NULL, N/A, None, …). None reports them: such a label is a class, and an error where a number is expected."""
    similar_classes: Literal["merge"] | None = None
    """Classes whose names differ in case, spacing or Unicode form only. None reports them; merge makes them one, under
    the commonest name."""


class AugmentationConfig(ConfigSection):
    """Easy data augmentation (Wei & Zou 2019, arXiv:1901.11196) of the training split; other splits stay as read."""

    copies: Annotated[int, Field(ge=1, le=16)] = 1
    """Changed copies added for each training row."""
    swap: Fraction = 0.1
    """Share of words swapped with another word."""
    delete: Fraction = 0.1
    """Share of words removed."""
    typo: Fraction = 0.0
    """Share of words in which two adjacent letters are swapped."""


class DataConfig(ConfigSection):
    """The data set: where it comes from, which columns matter, and how it is cleaned, split and truncated."""

    source: str | tuple[str, ...]
    """Hub id, a file (csv, tsv, json, jsonl, parquet, xlsx, txt), a folder (train/validation/test files, or a folder of
    texts per label), or package:NAME; several sources are mixed."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    subset: str | None = None
    """Configuration of a hub data set, sheet of an Excel file or list of a JSON file that has several."""
    splits: dict[Literal["train", "validation", "test"], str] = Field(default_factory=dict)
    """The source's names for the splits, where they differ: {validation: dev}."""
    delimiter: Annotated[str, BeforeValidator(_as_delimiter), Field(min_length=1, max_length=1)] | None = None
    """Separator of CSV files, one character or tab; None detects comma, semicolon, tab or bar."""
    quote: Literal['"', "'", "none"] | None = None
    """Character that encloses fields of CSV files; none takes quotes as they are. None detects it."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = None
    """Encoding of text files that are not UTF-8; None detects UTF-16 by its mark, and cp1252."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text (entailment, similarity)."""
    label: str | tuple[str, ...] = "label"
    """Column of the label; several columns of 0/1, true/false or yes/no are a multi-label task."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """What stands between several labels of one cell, where they are text: "|" in "sports|politics"."""
    labels: tuple[ClassName, ...] | None = None
    """Label names, in id order; None takes them from the source. A label that is not among them is an error. With
    one-hot lists, the names of their places."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"] = "auto"
    """Format of instruction rows; auto detects it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Your column names for instruction rows: {instruction: question, output: answer}."""
    ignore: tuple[str, ...] = ()
    """Columns of instruction rows, and keys of their turns, to leave out on purpose. Others that are not used are
    listed before training; calls and reasoning, without which another answer would be learned, are refused."""
    system: str | None = None
    """System prompt for conversations that have none."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Share of each source in the training split when several are mixed; None takes all rows of each."""
    streaming: bool = False
    """Tokenize to disk in chunks, so that the source need not fit in memory."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per row; longer rows are truncated, and reported. A base model that reads fewer sets the limit."""
    validation_size: Annotated[float, Field(gt=0)] = 0.1
    """Share (below 1) or rows of the training split held out when the source has no validation split."""
    test_size: Annotated[float, Field(ge=0)] = 0.2
    """Share (below 1) or rows held out when the source has no test split; 0 for none."""
    split_seed: int = 0
    """Seed of the splits, separate from training.seed so that runs with other seeds see the same test rows."""
    stratify: bool = True
    """Keep the class proportions in every split that peftkit creates."""
    limit: Rows | dict[Literal["train", "validation", "test"], Rows] | None = None
    """Rows of each split (a seeded sample), for a quick look; None takes all."""
    cleaning: CleaningConfig = CleaningConfig()
    """How bad rows are handled."""
    augmentation: AugmentationConfig | None = None
    """Augmentation of the training split; None for none."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """``label`` as a tuple."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @model_validator(mode="after")
    def _weights_match_sources(self) -> DataConfig:
        sources = 1 if isinstance(self.source, str) else len(self.source)
        if self.weights is not None and len(self.weights) != sources:
            raise ValueError(f"data.weights has {len(self.weights)} values for {sources} sources; give one per source")
        return self


class EarlyStopping(ConfigSection):
    """Stop when validation no longer improves."""

    patience: Annotated[int, Field(ge=1)] = 3
    """Validations without improvement after which training stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest improvement that counts."""


class TrainingConfig(ConfigSection):
    """How long, in which steps and in what order the model is trained."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training split; a fraction is allowed."""
    max_steps: Rows | None = None
    """Optimizer steps after which training ends, if that comes first."""
    max_time: Annotated[float, Field(gt=0)] | None = None
    """Minutes of training after which a checkpoint is written and the run ends, resumable."""
    batch_size: Rows = 16
    """Rows per optimizer step, over all processes and micro-batches."""
    batch_tokens: Rows | None = None
    """Padded tokens per optimizer step, in place of batch_size: short rows make larger batches."""
    micro_batch: Rows | Literal["auto"] | None = None
    """Rows per micro-batch of a process; None takes its share of the batch at once; auto starts there and halves when
    memory runs out. Gradients do not depend on it."""
    micro_batch_tokens: Rows | None = None
    """Padded tokens per micro-batch, in training and evaluation; None takes 1,024 on a CPU, where more is no faster,
    and 32,768 elsewhere. Gradients do not depend on it."""
    batching: Literal["length", "random"] = "length"
    """length: batches of rows of similar length (little padding), shuffled; random: plain shuffling, for instruction
    tuning, where a token would weigh more in a batch of short rows. Micro-batches always group similar lengths."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; None takes the method's default."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), SGD with momentum 0.9, or Adafactor (Shazeer & Stern 2018). adamw_8bit keeps
    AdamW's moments in 8 bits (arXiv:2110.02861); the paged ones move them out of a full GPU's memory."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; biases and normalization weights are exempt."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; None does not clip."""
    scheduler: Literal[SCHEDULERS] = "linear"  # type: ignore[valid-type]
    """Learning-rate schedule after warmup, by its transformers name."""
    warmup: Annotated[float, Field(ge=0)] = 0.06
    """Share (below 1) or number of steps over which the learning rate rises from 0."""
    gradient_checkpointing: Annotated[Literal["off", "selective", "full"], BeforeValidator(_as_mode)] = "off"
    """Recompute activations in the backward pass to save memory. full: everything in a block, about a third more time;
    selective: everything but matmuls, whose results are stored; true and false mean full and off."""
    compile: bool = False
    """Compile the blocks with torch.compile: a minute or so once, then faster steps where many small kernels dominate.
    Needs Triton on a GPU, a C++ compiler on a CPU."""
    feature_cache_gb: Annotated[float, Field(ge=0)] = 8.0
    """GB of disk for the cached outputs of frozen blocks, computed once for all epochs and runs; the least recently
    used are evicted. 0 disables the cache."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the input embeddings in training (NEFTune, arXiv:2310.05914)."""
    weight_averaging: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the trained weights, which is validated and exported in place of the
    weights themselves (arXiv:1703.01780): 0.999 or 0.99 smooths out a high learning rate."""
    early_stopping: EarlyStopping | None = None
    """Stop early when validation no longer improves; None trains to the end."""
    best_metric: str | None = None
    """Validation metric by which the best checkpoint is chosen and restored at the end; None takes the task's own."""
    evaluate_every: Literal["epoch"] | Rows = "epoch"
    """Steps between validations, or every epoch."""
    save_every: Literal["epoch"] | Rows = "epoch"
    """Steps between checkpoints, or every epoch; the best validation so far is always saved."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of newest checkpoints to keep, besides the best."""
    log_every: Rows = 10
    """Steps between log lines."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: stop the run, or skip the step and count it."""
    seed: int = 0
    """Seeds the new weights, the batch order, dropout and augmentation."""
    threads: Rows | None = None
    """CPU threads per process; None takes cores ÷ processes."""

    @field_validator("epochs")
    @classmethod
    def _finite(cls, value: float) -> float:
        if value == float("inf"):
            raise ValueError("expected a finite number; use max_steps or max_time to bound a run")
        return value


class GenerationConfig(ConfigSection):
    """How text is generated, in evaluation and from the command line."""

    max_new_tokens: Rows = 128
    """Most tokens to generate."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; higher values are more varied."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling (Holtzman et al. 2020): the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 for all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the scores of tokens that already occur (CTRL, arXiv:1909.05858)."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beam search: texts that are continued side by side, of which the likeliest is given; 1 is greedy."""
    length_penalty: float = 1.0
    """Beam search: a text's log-probability is divided by its tokens to this power; larger values prefer longer texts,
    0 and below short ones."""
    seed: int = 0
    """Seed of the sampling."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Held-out rows to generate for before and after training; 0 for none."""
    test_rows: Rows | Literal["all"] | None = None
    """Test rows to generate for ROUGE, chrF and BLEU with intervals, before training as well where zero_shot is among
    the baselines; None for none."""
    prompts: tuple[str, ...] = ()
    """Your own prompts, generated for before and after training."""

    @model_validator(mode="after")
    def _beams_are_not_sampled(self) -> GenerationConfig:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams={self.num_beams} searches, and temperature={self.temperature:g} draws "
                "at random; set num_beams=1 or temperature=0"
            )
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError(
                f"length_penalty={self.length_penalty:g} belongs to beam search; set num_beams to 2 or more"
            )
        return self


class EvaluationConfig(ConfigSection):
    """How the result is scored, and what it is compared with."""

    metrics: tuple[str, ...] | None = None
    """Names of evaluate modules (accuracy, f1, …, or one from the hub); None takes the task's own."""
    baselines: tuple[Annotated[str, NameIn(BASELINES)], ...] | None = None
    """Baselines that the result is compared with; None takes the task's own."""
    batch_size: Rows | None = None
    """Rows per evaluation batch, which training.micro_batch_tokens also bounds; None takes 32."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the confidence intervals."""
    worst: Annotated[int, Field(ge=0)] = 20
    """Number of worst mistakes to list."""
    generation: GenerationConfig = GenerationConfig()
    """How text is generated."""


class ExportConfig(ConfigSection):
    """What is written besides the adapter."""

    merge: bool = False
    """Also write the base with the adapter merged into it."""
    prove: bool = True
    """Reload the export in a fresh process and compare its outputs with the trained model's."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-3
    """Largest difference of logits, relative to their standard deviation, that passes the proof."""
    backends: tuple[Annotated[str, AfterValidator(_runs_without_torch)], ...] = ()
    """Formats of other runtimes (onnx, onnx-int8) to write into the run's folder as well. `peftkit predict` takes the
    fastest of them or torch; one that rounds, such as onnx-int8, by itself only where it is named here."""


class Recipe(ConfigSection):
    """One whole run: model, quantization, method, task, data, training, evaluation, export."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    """Names the run's folder: letters, digits, '_', '-' and '.'."""
    model: ModelConfig
    quantization: Annotated[Any, DiscriminatedBy(QUANTIZATIONS)] | None = None
    method: Annotated[Any, DiscriminatedBy(METHODS)] = Field(default="lora", validate_default=True)
    task: Annotated[Any, DiscriminatedBy(TASKS)] = Field(default="classification", validate_default=True)
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    tracking: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers by name (tensorboard, wandb, mlflow, …); empty for none."""
    output_dir: str = "runs"
    """Folder that holds the run's folder."""

    @model_validator(mode="after")
    def _method_fits(self) -> Recipe:
        self.method.check(self)
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> Recipe:
        if self.model.offload is not None and self.training.compile:
            raise ValueError(
                "model.offload frees and fills the weights of blocks between calls, which training.compile does not "
                "expect; set training.compile=false, or model.offload=null"
            )
        return self

    @classmethod
    def parse(cls, values: Any, *, origin: str = "recipe") -> Recipe:
        """A recipe from plain values; raises RecipeError that names every wrong field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError(describe(error, origin)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file; raises RecipeError with file, line and column."""
        return recipe_yaml.read(Path(path), cls.model_validate)

    def to_yaml(self, *, defaults: bool = True) -> str:
        """The recipe as YAML; ``defaults=False`` leaves out what is at its default."""
        return recipe_yaml.write(self, defaults=defaults)

    @property
    def starts_as_compared(self) -> bool:
        """Whether the untrained model is what training is compared with: the base's outputs, or a given adapter's."""
        return self.model.continues or bool(self.method.starts_as_base)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the recipe's, or the method's default."""
        return self.training.learning_rate or self.method.default_learning_rate


def replace(recipe: Recipe, **parts: Any) -> Recipe:
    """A new validated recipe with parts, or some fields of a part, replaced.

    A mapping changes the fields it names and keeps the rest; one with another ``kind`` swaps the whole part.

    >>> replace(recipe, name="quick", training={"epochs": 1}, method={"kind": "frozen"})  # doctest: +SKIP
    """
    values = recipe.model_dump()
    for name, value in parts.items():
        if name not in values:
            raise RecipeError(f"recipe has no part '{name}': {did_you_mean(name, values)}")
        values[name] = merge(values[name], value)
    return Recipe.parse(values, origin=f"recipe '{values['name']}'")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every field of a recipe as dotted name → plain value, such as ``training.epochs`` → 3."""

    def leaves(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(leaves("", recipe.model_dump(mode="json")))


def merge(old: Any, new: Any) -> Any:
    """``old`` updated with the fields of ``new``, section by section; a new ``kind`` starts from its own defaults.

    A new ``source`` drops what belonged to the old one, such as its pinned revision.
    """
    if isinstance(new, ConfigSection):
        return new
    if not isinstance(new, dict) or not isinstance(old, dict) or new.get("kind", old.get("kind")) != old.get("kind"):
        return new
    if new.get("source", old.get("source")) != old.get("source"):
        old = {key: value for key, value in old.items() if key not in BOUND_TO_SOURCE}
    return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}}
