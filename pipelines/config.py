"""Validated settings of a run. Does not import torch, so a command rejects a wrong setting without delay."""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from optim.specs import ADAM_KEYWORDS, PARTS, RANGES, SPECS, OptimizerSpec, Range
from pipelines.optimizers import import_path_of, join_key

if TYPE_CHECKING:
    from torch import nn

Decay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=2**20)]
"""A dimension of a model. Bounded: a number in a file must not size an allocation or a loop without a limit."""
Count = Annotated[int, Field(gt=0, le=10**12)]
"""A number of steps, batches or tokens."""
Length = Annotated[float, Field(gt=0, le=10**9)]
"""Length of a run in epochs, or in tokens per parameter."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""The seeds that torch accepts."""
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]


class Settings(BaseModel):
    """A table of settings: rejects unknown keys and is immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NamedOptimizerSettings(Settings):
    """Settings that every optimizer has."""

    name: str
    no_decay: tuple[str, ...] = ()
    """Parameters without weight decay: `embeddings`, `head`, or names with wildcards, such as `*.bias`."""
    lr: NonNegativeFloat
    parts: Settings | None = None
    """Keywords for parts of the model: a table for each of `optim.specs.PARTS`."""

    @property
    def is_imported(self) -> bool:
        """Whether the name is an import path."""
        return isinstance(self, ImportedOptimizerSettings)

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> Self:
        low, high = getattr(self, "min_scale", None), getattr(self, "max_scale", None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_scale={low} is above max_scale={high}")
        return self


def _settings_of(spec: OptimizerSpec) -> type[NamedOptimizerSettings]:
    """Return the settings class of an optimizer: its constructor's keywords, and those of `optim.build_optimizer`."""
    fields: dict[str, Any] = {"name": (Literal[spec.name], ...)}
    fields |= {key: (_annotation(spec.range_of(key)), default) for key, default in spec.defaults.items()}
    if spec.takes_matrices:
        # Whether the query and key weights of each attention head are separate matrices.
        fields["by_heads"] = (bool, False)
        fields["row_blocks"] = (dict[str, Size | tuple[Size, ...]] | None, None)
        fields |= {f"adam_{key}": (_annotation(RANGES[key]) | None, None) for key in ADAM_KEYWORDS}
    parts = {part: (_part_settings_of(spec, part) | None, None) for part in PARTS}
    fields["parts"] = (create_model(f"{spec.class_name}Parts", __base__=Settings, **parts) | None, None)  # type: ignore[call-overload]
    return create_model(f"{spec.class_name}Settings", __base__=NamedOptimizerSettings, **fields)


def _part_settings_of(spec: OptimizerSpec, part: str) -> Any:
    ranges = {key: spec.range_of(key) if key in spec.defaults else RANGES[key] for key in spec.part_keywords(part)}
    fields: dict[str, Any] = {key: (_annotation(values) | None, None) for key, values in ranges.items()}
    return create_model(f"{spec.class_name}{part.title()}Settings", __base__=Settings, **fields)


def _annotation(values: Range) -> Any:
    if values.choices:
        return Literal[values.choices]
    number: Any = Annotated[values.type, Field(ge=values.ge, gt=values.gt, lt=values.lt, le=values.most)]
    return number if values.length == 1 else tuple[(number,) * values.length]  # type: ignore[misc]


OPTIMIZER_SETTINGS = {name: _settings_of(spec) for name, spec in SPECS.items()}
"""Settings classes by optimizer name."""


class ImportedOptimizerSettings(NamedOptimizerSettings):
    """Settings of an optimizer of another library, by import path. Its constructor's keywords are further keys."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    parts: dict[Literal[PARTS], dict[str, Any]] | None = None  # type: ignore[assignment, valid-type]

    @model_validator(mode="after")
    def _can_be_recorded(self) -> Self:
        """Refuse what JSON cannot hold: a resumed run would begin with other keywords."""
        for key, value in {**(self.__pydantic_extra__ or {}), "parts": self.parts}.items():
            if not _is_json(value):
                raise ValueError(f"{key} = {value!r}: must be a finite number, a text, true, false, or a list of these")
        return self

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of the constructor: tuples for TOML's lists, and None for the text "None", which TOML cannot say."""
        given = {"lr": self.lr, **(self.__pydantic_extra__ or {})}
        values = {key: None if value == "None" else value for key, value in given.items()}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_json, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))


IMPORTED = "import path"
"""Tag of `ImportedOptimizerSettings` in the union of optimizer settings."""


def settings_class_of(optimizer: str) -> type[NamedOptimizerSettings] | None:
    """Return the settings class of a name or import path; None if it is neither."""
    return OPTIMIZER_SETTINGS.get(optimizer) or (ImportedOptimizerSettings if import_path_of(optimizer) else None)


def _tag_of(settings: Any) -> str | None:
    name = settings.get("name") if isinstance(settings, dict) else getattr(settings, "name", None)
    if not isinstance(name, str) or settings_class_of(name) is None:
        return None
    return name if name in OPTIMIZER_SETTINGS else IMPORTED


if TYPE_CHECKING:
    OptimizerSettings = NamedOptimizerSettings
else:
    _TAGGED = {**OPTIMIZER_SETTINGS, IMPORTED: ImportedOptimizerSettings}
    _MEMBERS = tuple(Annotated[settings, Tag(tag)] for tag, settings in _TAGGED.items())
    OptimizerSettings = Annotated[Union[_MEMBERS], Discriminator(_tag_of)]  # noqa: UP007


class ModelSettings(Settings, ABC):
    """Settings of a model."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Display name of the model."""

    def without_effect(self) -> dict[str, str]:
        """Return the keys that have no effect, each with the setting that makes it so, such as `softcap=0`."""
        return {}


class DecoderSettings(ModelSettings):
    """Settings that every decoder has; one subclass for each `kind`. The data determines the vocabulary."""

    kind: str
    context_length: Size

    @abstractmethod
    def parameters(self, vocab_size: int) -> int:
        """Return the number of elements in the weight matrices, without gains and biases."""

    @abstractmethod
    def build(self, vocab_size: int) -> nn.Module:
        """Return a newly initialized decoder: (batch, time) tokens → (batch, time, padded vocabulary) logits."""

    @field_validator("kind", mode="before")
    @classmethod
    def _is_known(cls, kind: object) -> object:
        if kind not in [*DECODERS]:  # a list, since what stands in a file may have no hash
            raise ValueError(f"unknown decoder {kind!r}; known: {', '.join(DECODERS)}")
        return kind


class GPTSettings(DecoderSettings):
    """Dimensions and options of `models.gpt.GPT`."""

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
        return _round_up(vocab_size, self.vocab_multiple)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        _require_divisor(self, "n_heads", "d_model")
        return self


def _not_tiny(softcap: float) -> float:
    if 0 < softcap < 1e-3:  # its square must not vanish in float32
        raise ValueError(f"{softcap} is below 0.001; 0 switches the bound off")
    return softcap


class TransformerSettings(DecoderSettings):
    """Dimensions and parts of `models.transformer.Transformer`, which has the formulas. The defaults are Llama's."""

    kind: Literal["transformer"]
    n_layers: Annotated[int, Field(gt=0, le=10_000)]
    n_heads: Size
    n_kv_heads: Size | None = None
    """Heads of keys and values, each shared by several query heads; `n_heads` if absent."""
    d_model: Size
    d_ff: Size
    norm: Literal["rms", "layer"] = "rms"
    norm_gain: bool = True
    norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-5
    embedding_norm: bool = False
    """Whether the embedded tokens are normalized."""
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The first pairs of each head that turn, as a fraction."""
    rotary_base: Annotated[float, Field(ge=1)] = 10_000.0
    rotary_endpoint: bool = False
    """Whether the slowest pair turns by exactly 1 / base a position; if not, it is the next one that would."""
    rotary_style: Literal["half", "interleaved"] = "half"
    """A pair: elements i and i + d_head / 2, as in Hugging Face's Llama, or 2i and 2i + 1."""
    rotary_clockwise: bool = False
    """Whether pairs turn by negative angles."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalized in each head, without a gain."""
    attention_scale: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Factor of the attention scores; 1 / √d_head if absent."""
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    bias: bool = False
    """Whether linear layers, the head too, and layer norms have biases."""
    tied_head: bool = False
    softcap: Annotated[float, Field(ge=0, le=1e6), AfterValidator(_not_tiny)] = 0.0
    """Bound c of the logits; 0 for none."""
    softcap_form: Literal["sqrt", "tanh"] = "sqrt"
    """c · z / √(z² + c²), or c · tanh(z / c)."""
    z_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Coefficient of the z-loss, which is added to the training loss, not to the validation loss."""
    init: Literal["gpt2", "track3", "width-scaled"] = "gpt2"
    embedding_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: Decay = 0.0
    vocab_multiple: Size = 1
    """The vocabulary is padded to a multiple of this."""

    @property
    def title(self) -> str:
        return "transformer"

    def parameters(self, vocab_size: int) -> int:
        d_head = self.d_model // self.n_heads
        attention = 2 * self.d_model * (self.d_model + d_head * (self.n_kv_heads or self.n_heads))
        feed_forward = (3 if self.mlp in ("swiglu", "geglu") else 2) * self.d_model * self.d_ff
        tables = _round_up(vocab_size, self.vocab_multiple) * (1 if self.tied_head else 2)
        tables += self.context_length if self.positions == "learned" else 0
        return self.n_layers * (attention + feed_forward) + tables * self.d_model

    def build(self, vocab_size: int) -> nn.Module:
        from models.transformer import Transformer, TransformerConfig

        parts = self.model_dump(exclude={"kind", "vocab_multiple", "z_loss"})
        parts |= {"n_kv_heads": self.n_kv_heads or self.n_heads}
        return Transformer(TransformerConfig(vocab_size=_round_up(vocab_size, self.vocab_multiple), **parts))

    def without_effect(self) -> dict[str, str]:
        rotary = [key for key in type(self).model_fields if key.startswith("rotary_")]
        unused = dict.fromkeys(rotary, "positions=learned") if self.positions == "learned" else {}
        return unused if self.softcap else {**unused, "softcap_form": "softcap=0"}

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        is_rotary = self.positions == "rotary"
        if is_rotary and self.d_model % 2:
            raise ValueError(f"positions=rotary needs an even d_model, not {self.d_model}")
        _require_divisor(self, "n_heads", "d_model", even_quotient=is_rotary)
        if self.n_kv_heads is not None:
            _require_divisor(self, "n_kv_heads", "n_heads")
        pairs = self.d_model // self.n_heads // 2
        turning = self.rotary_fraction * pairs
        if is_rotary and (turning < 0.5 or abs(turning - round(turning)) > 1e-6):
            fractions = f"a multiple of 1/{pairs}, since a head has {pairs} pairs"
            raise ValueError(f"rotary_fraction={self.rotary_fraction} must be {fractions}")
        return self

    @model_validator(mode="after")
    def _tied_heads_are_plain(self) -> Self:
        for key, ties in (("init", ("gpt2",)), ("embedding_dtype", ("float32",))):
            if self.tied_head and getattr(self, key) not in ties:
                raise ValueError(f"{key}={getattr(self, key)} needs a head of its own; set tied_head=false")
        return self


def _require_divisor(settings: ModelSettings, key: str, whole_key: str, *, even_quotient: bool = False) -> None:
    """Raise `ValueError`, with the nearest values that would do, unless a setting divides another."""
    value, whole = getattr(settings, key), getattr(settings, whole_key)
    unit = 2 if even_quotient else 1
    if whole % (unit * value) == 0:
        return
    right = [each for each in range(1, whole + 1) if whole % (unit * each) == 0]
    nearest = [each for each in right if each < value][-1:] + [each for each in right if each > value][:1]
    advice = f"{' or '.join(map(str, nearest))} would do"
    if whole % value:
        raise ValueError(f"{key}={value} does not divide {whole_key}={whole}; {advice}")
    size = f"{whole_key} / {key} = {whole} / {value} = {whole // value}"
    raise ValueError(f"positions=rotary needs an even head size, not {size}; {key}={advice}")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


DECODERS: dict[str, type[DecoderSettings]] = {"gpt": GPTSettings, "transformer": TransformerSettings}
"""Settings classes by `kind`. A configuration without `kind` is a "gpt"."""


class DataSettings(Settings):
    """Location of the data."""

    folder: LocalPath


DataOrder = Literal["shuffled", "sequential"]


class TokenDataSettings(DataSettings):
    """Location of the token shards, and the order of their windows."""

    order: DataOrder = "shuffled"
    """`shuffled`: each epoch in its own order; `sequential`: in the order of the shards, as in modded-nanogpt."""


TransformName = Literal["paper", "standard", "small", "none"]
Alpha = Annotated[float, Field(ge=0, le=1e6)]


class ImageDataSettings(DataSettings):
    """Location of the images, and how they are transformed; `pipelines.data.images.inputs` has the defaults."""

    transform: TransformName | None = None
    """Crops of training images; see docs/images.md. If absent, `small` for decoded images and `standard` for others."""
    resolution: Annotated[int, Field(gt=0, le=2**14)] | None = None
    """Height and width of the model's input, in pixels; if absent, that of decoded images, and 208 (`paper`) or 224."""
    mean: tuple[Fraction, ...] | None = None
    """Mean of each channel, for values between 0 and 1; of decoded training images, or ImageNet, if absent."""
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Standard deviation of each channel; as `mean`."""
    flip: bool = True
    """Whether `standard` and `small` mirror half of the training images. Digits and letters need false."""
    pad: Annotated[int, Field(ge=0, le=2**10)] = 4
    """Pixels of reflected border from which `small` crops."""
    randaugment: Annotated[int, Field(ge=0, le=14)] = 0
    """Operations of RandAugment on each training image."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    erasing: Fraction = 0.0
    """Probability that a rectangle of a training image is erased."""
    mixup: Alpha = 0.0
    """Parameter α of mixup's Beta distribution; 0 for no mixup."""
    cutmix: Alpha = 0.0
    """The same of CutMix. With both, each step takes one of them, with probability 1/2."""
    reduced_decoding: bool = True
    """Whether a large JPEG may be decoded at a smaller size. The error is bounded; see docs/imagenet.md."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What to do if an image cannot be decoded: stop with an error that names it, or count and skip it."""

    @model_validator(mode="after")
    def _mean_and_std_belong_together(self) -> Self:
        if {len(self.mean or ()), len(self.std or ())} not in ({0}, {1}, {3}):
            raise ValueError("give mean and std, each with one value for gray or three for colour, or neither")
        return self


CLASSIFIER_SIZES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("widths",),
    "vit_tiny": ("patch_size", "d_model", "n_layers", "n_heads"),
}
"""Keys of `ClassifierSettings` that only some classifiers of `models.vision` have: keywords of their constructors."""


class ClassifierSettings(ModelSettings):
    """A classifier of `models.vision`, without pretrained weights. Absent sizes are its constructor's defaults."""

    name: str = "efficientnet_b1"
    channels_last: Literal["auto", True, False] = "auto"
    """Whether channels are the last dimension in memory; `auto`: on a CUDA device."""
    widths: Annotated[tuple[Size, ...], Field(max_length=100)] | None = None
    """Widths of the hidden layers."""
    patch_size: Size | None = None
    """Height and width of a patch, in pixels."""
    d_model: Size | None = None
    n_layers: Annotated[int, Field(gt=0, le=10_000)] | None = None
    n_heads: Size | None = None

    @property
    def title(self) -> str:
        return self.name

    @property
    def sizes(self) -> dict[str, Any]:
        """Keywords of the classifier's constructor."""
        known = CLASSIFIER_SIZES.get(self.name, ())
        return {key: getattr(self, key) for key in known if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _sizes_are_of_the_classifier(self) -> Self:
        for name, keys in CLASSIFIER_SIZES.items():
            given = [key for key in keys if name != self.name and getattr(self, key) is not None]
            if given:
                raise ValueError(f"{given[0]} is a size of {name}, not of {self.name}; leave it out")
        return self


ScheduleKind = Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"]
WsdDecay = Literal["linear", "cosine", "sqrt", "power"]
WarmupSteps = Annotated[int, Field(ge=0, le=10**12)]
DecayFraction = Annotated[float, Field(gt=0, le=1)]


class _WarmupSettings(Settings):
    """Base class of schedules: the warm-up has one length."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if getattr(self, "warmup_steps", None) and getattr(self, "warmup_fraction", None):
            raise ValueError("give warmup_steps or warmup_fraction, not both")
        return self


class CurveSettings(_WarmupSettings, ABC):
    """A factor over the steps of a run: a linear warm-up to 1, then `kind`.

    `pipelines.training.schedule.factor_at` has the formulas.
    """

    kind: ScheduleKind = "constant"
    warmup_steps: WarmupSteps = 0
    """Steps of linear warm-up."""
    warmup_fraction: Decay = 0.0
    """The same as a fraction of all steps."""
    decay_fraction: DecayFraction = 0.2
    """Steps of the decay of `wsd`, as a fraction of all steps."""
    decay: WsdDecay = "linear"
    """Shape of this decay."""
    decay_power: Positive = 2.0
    """Exponent of the shape `power`."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """Factors at the first step of the warm-up, and at the end of `linear`, `cosine` and `wsd`."""


class FactorScheduleSettings(CurveSettings):
    """Schedule of a value other than the learning rate, relative to the value of each parameter group."""

    initial_fraction: NonNegativeFloat = 0.0
    """Value of the first warm-up step, as a fraction of the group's; may exceed 1."""
    final_fraction: NonNegativeFloat = 0.0
    """Value at the end of `linear`, `cosine` and `wsd`, as a fraction of the group's; may exceed 1."""

    @property
    def ends(self) -> tuple[float, float]:
        return self.initial_fraction, self.final_fraction


class PartScheduleSettings(_WarmupSettings):
    """Keys that override the learning rate schedule for a part of the model."""

    kind: ScheduleKind | None = None
    warmup_steps: WarmupSteps | None = None
    warmup_fraction: Decay | None = None
    decay_fraction: DecayFraction | None = None
    decay: WsdDecay | None = None
    decay_power: Positive | None = None
    initial_lr_fraction: Fraction | None = None
    final_lr_fraction: Fraction | None = None


class PartSchedules(Settings):
    """Learning rate schedules of the parts of a model."""

    embedding: PartScheduleSettings | None = None
    head: PartScheduleSettings | None = None
    vectors: PartScheduleSettings | None = None
    matrices: PartScheduleSettings | None = None


class ScheduleSettings(CurveSettings):
    """Learning rate schedule, relative to the optimizer's `lr`, and the schedules of other values."""

    initial_lr_fraction: Fraction = 0.0
    """Learning rate of the first warm-up step, as a fraction of `lr`."""
    final_lr_fraction: Fraction = 0.0
    """Learning rate at the end of `linear`, `cosine` and `wsd`, as a fraction of `lr`."""
    momentum: FactorScheduleSettings | None = None
    """Schedule of the momentum; of the first of `betas` for an optimizer without momentum."""
    beta2: FactorScheduleSettings | None = None
    """Schedule of beta2; of the second of `betas` for an optimizer without beta2."""
    weight_decay: FactorScheduleSettings | None = None
    parts: PartSchedules | None = None

    @property
    def ends(self) -> tuple[float, float]:
        return self.initial_lr_fraction, self.final_lr_fraction

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Keys that `kind` does not use; none if parts have their own schedules, which may use them."""
        if self.parts is not None:
            return ()
        of_wsd = ("decay_fraction", "decay", "decay_power")
        unused = {"wsd": (), "linear": of_wsd, "cosine": of_wsd}
        return unused.get(self.kind, (*of_wsd, "final_lr_fraction"))

    @property
    def named_parts(self) -> tuple[str, ...]:
        """Parts of the model with a schedule of their own."""
        return () if self.parts is None else tuple(name for name, own in self.parts if own is not None)

    def of_part(self, part: str | None) -> ScheduleSettings:
        """Return the learning rate schedule of a part; the general one without a part."""
        if part not in self.named_parts:
            return self
        own = getattr(self.parts, part).model_dump(exclude_none=True)
        if "warmup_steps" in own or "warmup_fraction" in own:  # one replaces the other
            own = {"warmup_steps": 0, "warmup_fraction": 0.0, **own}
        return self.model_copy(update=own)


class TrainingSettings(Settings):
    """Number of steps, batch size and numerics."""

    steps: Count
    batch_size: Size
    """Global batch size: sequences (or images) per step, over all processes and accumulation."""
    micro_batch_size: Size | None = None
    """Sequences (or images) per forward pass of one process; the process's whole batch if absent."""
    max_grad_norm: Positive | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema_decay: Decay | None = None
    """Decay of a moving average of the weights, which is validated, and saved with them; no average if absent."""

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")
        return self


class GPTTrainingSettings(TrainingSettings):
    """Training settings of a decoder.

    `pipelines.steps` converts `tokens` and `tokens_per_parameter` to `steps`; the rest of the program sees None.
    """

    tokens: Annotated[int, Field(gt=0, le=10**18)] | None = Field(None, exclude=True)
    """Length of the run in tokens, instead of `steps`."""
    tokens_per_parameter: Length | None = Field(None, exclude=True)
    """The same as a multiple of the number of the model's parameters."""
    activations: Literal["fp32", "bf16"] = "fp32"
    """Embeddings and residual stream where the forward pass is in bf16."""

    @model_validator(mode="after")
    def _activations_follow_the_precision(self) -> Self:
        if self.activations == "bf16" and self.precision not in ("auto", "bf16"):
            raise ValueError(f"activations=bf16 needs precision=bf16, not {self.precision}")
        return self


class ImageTrainingSettings(TrainingSettings):
    """Training settings of image classification.

    `pipelines.steps` converts `epochs` to `steps`; the rest of the program sees None.
    """

    epochs: Length | None = Field(None, exclude=True)
    """Length of the run in passes over the training images, instead of `steps`."""
    label_smoothing: Decay = 0.0


class EvaluationSettings(Settings):
    """How often to validate, and on how much data."""

    every: Count
    """Steps between validations. There is also one before the first step and one after the last."""
    batches: Count | None = None
    """Micro-batches per validation, always the same ones; all validation data if absent."""


class GPTEvaluationSettings(EvaluationSettings):
    """How often to validate a decoder, and on how many tokens."""

    tokens: Count | None = None
    """Instead of `batches`: the first tokens of the validation shards; a multiple of the context length."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.batches is not None and self.tokens is not None:
            raise ValueError("give batches or tokens, not both")
        return self


class MetricsSettings(Settings):
    """How often to record metrics."""

    every: Count = 1
    """Steps between recorded training losses."""


class StatisticsSettings(Settings):
    """How often to record layer statistics; see `pipelines.training.layer_statistics`."""

    every: Count | None = None
    """Steps between records; never if absent."""


class ShadowOptimizer(Settings):
    """An optimizer that computes what it would do, and the schedule that it has."""

    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()


class ShadowSettings(Settings):
    """Shadow optimizers of a run; see `pipelines.training.shadows`."""

    optimizers: dict[str, ShadowOptimizer] = {}
    """By name. `pipelines.shadow_settings` makes the table from a list such as `["muon", "adamw:lr=3e-4"]`."""
    every: Count = 100
    """Steps between records."""


class CheckpointSettings(Settings):
    """How often to save a checkpoint, and how many to keep."""

    every: Count
    """Steps between checkpoints. The last step is always saved."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""


TrackerName = Literal["tensorboard", "wandb"]


class RuntimeSettings(Settings):
    """Devices, parallelism and trackers. These settings may change when a run is resumed."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    """Whether to compile the model; `auto`: on a CUDA device."""
    shard_optimizer: bool = False
    """Whether to shard the optimizer: each process keeps the state and computes the updates of some of the weights."""
    shard_model: bool = False
    """Whether to shard the model (FSDP2): each process keeps a part of every weight, gradient and optimizer state."""
    timeout_s: Positive = 600.0
    """Seconds without progress after which the watchdog ends a distributed run."""
    track: tuple[TrackerName, ...] = ()
    """Trackers that also receive the metrics; see `pipelines.training.trackers`."""


class ImageRuntimeSettings(RuntimeSettings):
    """Runtime settings of a run on images."""

    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes that read and decode images; one per core if absent."""


class RunConfig(Settings):
    """Complete configuration of a training run; `GPTRunConfig` and `ImageRunConfig` are the tasks'."""

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
    shadows: ShadowSettings = ShadowSettings()
    checkpoint: CheckpointSettings
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _imported_optimizers_are_whole(self) -> Self:
        for key in ("shard_optimizer", "shard_model"):
            if self.optimizer.is_imported and getattr(self.runtime, key):
                raise ValueError(f"runtime.{key} works with asgo's own optimizers, not with {self.optimizer.name}")
        return self

    @model_validator(mode="after")
    def _sharded_model_has_no_loss_scale(self) -> Self:
        if self.runtime.shard_model and self.training.precision == "fp16":
            raise ValueError("training.precision=fp16 does not work with runtime.shard_model; use bf16")
        return self

    @model_validator(mode="after")
    def _sharding_has_no_statistics(self) -> Self:
        sharded = [key for key in ("shard_optimizer", "shard_model") if getattr(self.runtime, key)]
        measured = ["statistics.every"] * (self.statistics.every is not None)
        measured += ["shadows.optimizers"] * bool(self.shadows.optimizers)
        if measured and sharded:
            raise ValueError(
                f"{measured[0]} does not work with runtime.{sharded[0]}: no process has all tensors; drop one"
            )
        return self

    @classmethod
    def trains(cls, task: object) -> bool:
        """Whether this class is the configuration of the task with that name."""
        return task in get_args(cls.model_fields["task"].annotation)

    @property
    def validation_samples(self) -> int | None:
        """Sequences (or images) per validation, for any number of processes; None for all."""
        batches = self.evaluation.batches
        return None if batches is None else batches * (self.training.micro_batch_size or self.training.batch_size)

    def optimizer_keywords(self) -> dict[str, Any]:
        """Return the optimizer's settings as keywords of `optim.build_optimizer`."""
        settings = self.optimizer.model_dump(exclude={"name"}, exclude_none=True)
        if isinstance(self.optimizer, ImportedOptimizerSettings):
            settings |= self.optimizer.keywords
        return settings


class GPTRunConfig(RunConfig):
    """Pretraining of a GPT on token shards."""

    task: Literal["gpt"]
    data: TokenDataSettings
    model: GPTSettings
    training: GPTTrainingSettings
    evaluation: GPTEvaluationSettings
    init_from: LocalPath | None = None
    """A local Hugging Face folder, of a GPT-2 or Llama, with the initial weights; random ones if absent."""
    initial_weights_sha256: str | None = None
    """SHA-256 of those weights."""

    @model_validator(mode="after")
    def _validation_tokens_fill_windows(self) -> Self:
        tokens, window = self.evaluation.tokens, self.model.context_length
        if tokens is not None and tokens % window:
            raise ValueError(f"evaluation.tokens={tokens} is not a multiple of model.context_length={window}")
        return self

    @property
    def validation_samples(self) -> int | None:
        tokens = self.evaluation.tokens
        return super().validation_samples if tokens is None else tokens // self.model.context_length


class ImageRunConfig(RunConfig):
    """Classification of images."""

    task: Annotated[Literal["images"], BeforeValidator(lambda name: task_name(name))]
    data: ImageDataSettings
    model: ClassifierSettings = ClassifierSettings()
    training: ImageTrainingSettings
    runtime: ImageRuntimeSettings = ImageRuntimeSettings()

    @model_validator(mode="after")
    def _has_no_heads(self) -> Self:
        if getattr(self.optimizer, "by_heads", False):
            raise ValueError("optimizer.by_heads is for the attention of a GPT; leave it out")
        return self


RUN_CONFIGS = (GPTRunConfig, ImageRunConfig)

_EARLIER_NAMES = {"imagenet": "images"}


def task_name(name: Any) -> Any:
    """Return the present name of a task, for one that a stored configuration or a user's file has."""
    return _EARLIER_NAMES.get(name, name) if isinstance(name, str) else name


def run_config_of(values: Mapping[str, Any]) -> type[RunConfig]:
    """Return the configuration class for the "task" in `values`; `GPTRunConfig` if the task is unknown."""
    run_config: type[RunConfig] = next(
        (kind for kind in RUN_CONFIGS if kind.trains(task_name(values.get("task")))), GPTRunConfig
    )
    model = values.get("model")
    decoder = DECODERS.get(str(model.get("kind", "gpt"))) if isinstance(model, Mapping) else None
    if run_config is GPTRunConfig and decoder not in (None, GPTSettings):
        run_config = _with_decoder(decoder)
    return run_config


@functools.cache  # pydantic: configurations of two classes are never equal, so there must be one class for each kind
def _with_decoder(settings: type[DecoderSettings]) -> type[RunConfig]:
    return create_model(GPTRunConfig.__name__, __base__=GPTRunConfig, model=(settings, ...))


def load_run_config(values: Any) -> RunConfig:
    """Return the configuration for plain values, such as parsed JSON. Raises pydantic's `ValidationError`."""
    return run_config_of(values if isinstance(values, Mapping) else {}).model_validate(values)


MAY_CHANGE_ON_RESUME = (
    "data.folder",
    "data.bad_images",
    "init_from",
    "model.channels_last",
    "statistics.",
    "shadows.",
    "checkpoint.",
    "runtime.",
)
"""Dotted keys, or prefixes of keys, that may change when a run is resumed."""


_TABLES_OF_NAMES = ("optimizers.", "row_blocks.")


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into one table with dotted keys; see `pipelines.optimizers.split_key`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        # Names of optimizers and parameters may contain dots. Elsewhere, users also write "training.steps" = 100.
        path = prefix + (join_key([key]) if prefix.endswith(_TABLES_OF_NAMES) else key)
        if isinstance(value, dict):
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Return one line for each setting that prevents resuming a run of `saved` with `asked`."""
    old, new = flatten(saved.model_dump(mode="json")), flatten(asked.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if not key.startswith(MAY_CHANGE_ON_RESUME)]
    return [f"{key} is {old.get(key)} in the run, {new.get(key)} now" for key in keys if old.get(key) != new.get(key)]
