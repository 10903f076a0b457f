"""Every setting of a run, validated. Free of torch, so that a command can refuse a bad one at once."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    create_model,
    field_validator,
    model_validator,
)

from optim.specs import SPECS, OptimizerSpec, Range

if TYPE_CHECKING:
    from torch import nn

Decay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=2**20)]
"""Of one side of a model. A number in a file is not to size an allocation or a loop without a bound."""
Count = Annotated[int, Field(gt=0, le=10**12)]
"""Of steps."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""As torch takes them."""
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]


class Settings(BaseModel):
    """A table of settings: unknown keys are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NamedOptimizerSettings(Settings):
    """What can be set of every optimizer."""

    name: str
    no_decay: tuple[Literal["embeddings", "head"], ...] = ()
    """What takes no weight decay; matrix optimizers never decay these."""
    lr: NonNegativeFloat

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> Self:
        low, high = getattr(self, "min_scale", None), getattr(self, "max_scale", None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_scale={low} is above max_scale={high}")
        return self


def _settings_of(spec: OptimizerSpec) -> type[NamedOptimizerSettings]:
    """Settings of an optimizer: the keywords of its constructor, and for matrices how they are made."""
    fields: dict[str, Any] = {"name": (Literal[spec.name], ...)}
    fields |= {key: (_annotation(spec.range_of(key)), default) for key, default in spec.defaults.items()}
    if spec.takes_matrices:
        # Whether the query and key of each attention head are matrices of their own.
        fields["by_heads"] = (bool, False)
    return create_model(f"{spec.class_name}Settings", __base__=NamedOptimizerSettings, **fields)


def _annotation(values: Range) -> Any:
    if values.choices:
        return Literal[values.choices]
    number: Any = Annotated[values.type, Field(ge=values.ge, gt=values.gt, lt=values.lt, le=values.most)]
    return tuple[number, number] if values.is_pair else number


OPTIMIZER_SETTINGS = {name: _settings_of(spec) for name, spec in SPECS.items()}
"""By the names of the optimizers."""

if TYPE_CHECKING:
    OptimizerSettings = NamedOptimizerSettings
else:
    OptimizerSettings = Annotated[Union[tuple(OPTIMIZER_SETTINGS.values())], Field(discriminator="name")]  # noqa: UP007


class ModelSettings(Settings, ABC):
    """What a model is made of."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The model's name for people."""


class DecoderSettings(ModelSettings):
    """What every decoder has; the vocabulary comes with the data. One class for each `kind`."""

    kind: str
    context_length: Size

    @abstractmethod
    def parameters(self, vocab_size: int) -> int:
        """Elements of the weight matrices for a vocabulary; gains and biases are left out."""

    @abstractmethod
    def build(self, vocab_size: int) -> nn.Module:
        """A freshly initialized decoder: (batch, time) tokens → (batch, time, vocabulary and padding) logits."""

    @field_validator("kind", mode="before")
    @classmethod
    def _is_known(cls, kind: object) -> object:
        if kind not in DECODERS:
            raise ValueError(f"unknown decoder {kind!r}; known: {', '.join(DECODERS)}")
        return kind


class GPTSettings(DecoderSettings):
    """Shape of `models.gpt.GPT`."""

    kind: Literal["gpt"] = "gpt"
    n_layers: Annotated[int, Field(gt=0, le=10_000)]
    n_heads: Size
    d_model: Size
    d_ff: Size
    bias: bool = True
    tied_head: bool = True
    dropout: Decay = 0.0
    gelu: Literal["exact", "tanh"] = "exact"
    """`tanh` is the approximation that the published GPT-2 was trained with."""
    vocab_multiple: Size = 1
    """The vocabulary is padded to a multiple of this."""

    @property
    def title(self) -> str:
        return "GPT"

    def parameters(self, vocab_size: int) -> int:
        block = 4 * self.d_model**2 + 2 * self.d_model * self.d_ff
        tables = self._padded(vocab_size) * (1 if self.tied_head else 2) + self.context_length
        return self.n_layers * block + tables * self.d_model

    def build(self, vocab_size: int) -> nn.Module:
        from models.gpt import GPT

        shape = self.model_dump(exclude={"kind", "vocab_multiple"})
        return GPT(vocab_size=self._padded(vocab_size), **shape)

    def _padded(self, vocab_size: int) -> int:
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")
        return self


DECODERS: dict[str, type[DecoderSettings]] = {"gpt": GPTSettings}
"""The classes above, by `kind`. Configurations without `kind` have the first."""


class DataSettings(Settings):
    """Where the token shards are."""

    folder: LocalPath


class ImageDataSettings(DataSettings):
    """Where the images are, and what the model sees of them."""

    transform: Literal["paper", "standard"] = "paper"
    """`paper`: resize and centre-crop; `standard`: random crops and flips for training."""
    resolution: Annotated[int, Field(gt=0, le=2**14)] = 208
    """Height and width of what the model sees."""
    reduced_decoding: bool = True
    """Whether a large JPEG may be decoded at a smaller size, within a stated bound."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do about one that cannot be decoded: stop with its name, or count it and go on."""


class ClassifierSettings(ModelSettings):
    """A classifier of torchvision, without pretrained weights."""

    name: str = "efficientnet_b1"
    channels_last: bool = False

    @property
    def title(self) -> str:
        return self.name


class ScheduleSettings(Settings):
    """The learning rate over time, as a share of the optimizer's `lr`."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Steps of linear warm-up."""
    warmup_fraction: Decay = 0.0
    """The same as a share of all steps."""
    initial_lr_fraction: Fraction = 0.0
    """Where warm-up begins, as a share of `lr`: the rate of the first step."""
    final_lr_fraction: Fraction = 0.0
    """Where `cosine` and `linear` end, as a share of `lr`."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("give warmup_steps or warmup_fraction, not both")
        return self


class TrainingSettings(Settings):
    """What a step is, and how many there are."""

    steps: Count
    batch_size: Size
    """Sequences (or images) a step, over all processes and accumulation."""
    micro_batch_size: Size | None = None
    """Sequences a forward pass in one process; the whole batch if absent."""
    max_grad_norm: Positive | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema_decay: Decay | None = None
    """Validates, and saves beside the weights, their exponential moving average, which keeps this much of itself."""

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")
        return self


class ImageTrainingSettings(TrainingSettings):
    """What a step of image classification is."""

    label_smoothing: Decay = 0.0


class EvaluationSettings(Settings):
    """When to validate, and on how much."""

    every: Count
    """Steps from one validation to the next; the first is before the first step, the last after the last."""
    batches: Count | None = None
    """Micro-batches of validation data, always the same ones; all of it if absent."""


class MetricsSettings(Settings):
    """What is recorded while training."""

    every: Count = 1
    """Steps from one recorded training loss to the next."""


class StatisticsSettings(Settings):
    """Whether to record what a step does to each layer; see `pipelines.training.layer_statistics`."""

    every: Count | None = None
    """Steps from one record of every layer to the next; never if absent."""


class CheckpointSettings(Settings):
    """When to save, and how much to keep."""

    every: Count
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""


TrackerName = Literal["tensorboard", "wandb"]


class RuntimeSettings(Settings):
    """How the run is carried out; these may change when it is resumed."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    compile: bool = False
    shard_optimizer: bool = False
    """Whether each process keeps the optimizer's state, and does its work, for a share of the weights only."""
    shard_model: bool = False
    """Whether each process keeps a share of every weight only, and so of the optimizer's state too."""
    timeout_s: Positive = 600.0
    """Seconds without a step after which the processes of a run give up on the one that is behind."""
    track: tuple[TrackerName, ...] = ()
    """What is given the records as well; see `pipelines.training.trackers`."""


class ImageRuntimeSettings(RuntimeSettings):
    """How a run on images is carried out."""

    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes that read and decode; one a processor if absent."""


class RunConfig(Settings):
    """Everything that determines a training run; `GPTRunConfig` and `ImageNetRunConfig` say of what."""

    task: str
    preset: str
    seed: Seed = 42
    data: DataSettings
    model: ModelSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings
    metrics: MetricsSettings = MetricsSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    checkpoint: CheckpointSettings
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _shares_have_no_loss_scale(self) -> Self:
        if self.runtime.shard_model and self.training.precision == "fp16":
            raise ValueError("training.precision=fp16 cannot go with runtime.shard_model; use bf16")
        return self

    @model_validator(mode="after")
    def _shares_have_no_statistics(self) -> Self:
        shared = [key for key in ("shard_optimizer", "shard_model") if getattr(self.runtime, key)]
        if self.statistics.every is not None and shared:
            raise ValueError(
                f"statistics.every cannot go with runtime.{shared[0]}, where no process has it all; drop one"
            )
        return self

    @classmethod
    def trains(cls, task: object) -> bool:
        """Whether a configuration of this class trains the task of that name."""
        return task in get_args(cls.model_fields["task"].annotation)

    @property
    def validation_samples(self) -> int | None:
        """How many sequences (or images) a validation takes, with any number of processes; None for all."""
        batches = self.evaluation.batches
        return None if batches is None else batches * (self.training.micro_batch_size or self.training.batch_size)

    def optimizer_keywords(self) -> dict[str, Any]:
        """The optimizer's settings as keywords of `optim.build_optimizer`."""
        return self.optimizer.model_dump(exclude={"name"})


class GPTRunConfig(RunConfig):
    """Pretraining of a GPT on token shards."""

    task: Literal["gpt"]
    model: GPTSettings
    init_from: LocalPath | None = None
    """A local Hugging Face GPT-2 folder, whose weights are the first ones; fresh ones if absent."""
    initial_weights_sha256: str | None = None
    """Of those weights."""


class ImageNetRunConfig(RunConfig):
    """Classification of the images of ImageNet, or of a folder in its shape."""

    task: Literal["imagenet"]
    data: ImageDataSettings
    model: ClassifierSettings = ClassifierSettings()
    training: ImageTrainingSettings
    runtime: ImageRuntimeSettings = ImageRuntimeSettings()

    @model_validator(mode="after")
    def _has_no_heads(self) -> Self:
        if getattr(self.optimizer, "by_heads", False):
            raise ValueError("optimizer.by_heads is for the attention of a GPT; leave it out")
        return self


RUN_CONFIGS = (GPTRunConfig, ImageNetRunConfig)


def run_config_of(values: Mapping[str, Any]) -> type[RunConfig]:
    """The class of the configuration that `values` are, by their "task"; GPT's for a task that there is not."""
    run_config: type[RunConfig] = next((kind for kind in RUN_CONFIGS if kind.trains(values.get("task"))), GPTRunConfig)
    model = values.get("model")
    decoder = DECODERS.get(model.get("kind", "gpt")) if isinstance(model, Mapping) else None
    if run_config is GPTRunConfig and decoder not in (None, GPTSettings):
        run_config = _with_decoder(decoder)
    return run_config


@functools.cache  # one class for each kind: configurations of two classes are never equal
def _with_decoder(settings: type[DecoderSettings]) -> type[RunConfig]:
    return create_model(GPTRunConfig.__name__, __base__=GPTRunConfig, model=(settings, ...))


def load_run_config(values: Any) -> RunConfig:
    """A configuration from plain values, such as JSON. Raises pydantic's `ValidationError`."""
    return run_config_of(values if isinstance(values, Mapping) else {}).model_validate(values)


MAY_CHANGE_ON_RESUME = ("data.folder", "data.bad_images", "init_from", "statistics.", "checkpoint.", "runtime.")
"""Dotted keys, or prefixes of keys, in which a resumed run may differ from the one it continues."""


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """One line for each setting that keeps `asked` from continuing a run of `saved`."""
    old, new = flatten(saved.model_dump(mode="json")), flatten(asked.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if not key.startswith(MAY_CHANGE_ON_RESUME)]
    return [f"{key} is {old.get(key)} in the run, {new.get(key)} now" for key in keys if old.get(key) != new.get(key)]
