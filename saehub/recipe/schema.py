"""What a recipe may say: frozen dataclasses, one field a knob; `saehub.recipe.check` fills them from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from saehub.api import ModelShape, ModelSpec

FORMAT_VERSION = 1
Number = Literal["float32", "bfloat16", "float16"]


def yaml_name(name: str) -> str:
    """A field's key in YAML: `with_` is `with`."""
    return name.removesuffix("_")


# Read by pydantic when a recipe is checked or its JSON Schema is written; nothing here imports pydantic.
_CONFIG = {"alias_generator": yaml_name, "use_attribute_docstrings": True}


@dataclass(frozen=True)
class ModelEntry:
    """The language model."""

    __pydantic_config__ = _CONFIG

    name: str
    """`builtin/tiny-llama`, a Hugging Face id, or a local directory."""
    revision: str | None = None
    """Hub branch, tag or commit; without it `main`, recorded as the commit that it was."""
    dtype: Number = "float32"
    """Weights and activations of the model."""
    device: str = "auto"
    """`auto` (cuda, then mps, then cpu), or a torch device name such as `cuda:1`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; the two differ in the last bits."""
    shape: ModelShape | None = None
    """The model's sizes, for a plan without access to its config.json (a gated model, no network)."""

    def spec(self) -> ModelSpec:
        """The same without the declared shape, as the data layer takes it."""
        return ModelSpec(self.name, self.revision, self.dtype, self.device, self.attention)


@dataclass(frozen=True)
class SourceEntry:
    """One source of text."""

    __pydantic_config__ = _CONFIG

    source: str
    """`builtin/python-docs`, `builtin/python-code`, a local .txt/.jsonl/.parquet file or folder, or a Hugging Face dataset id."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the mixture's tokens, relative to the other weights."""
    split: str = "train"
    """Split; `heldout` is the default under `data.eval`."""
    field: str = "text"
    """Column (or JSON key) that holds the text."""
    config: str | None = None
    """Configuration of a Hugging Face dataset."""
    streaming: bool = False
    """Read a Hugging Face dataset as it is downloaded instead of storing it first."""
    revision: str | None = None
    """Revision of a Hugging Face dataset."""


@dataclass(frozen=True)
class TrainData:
    """The rows that trainers see."""

    __pydantic_config__ = _CONFIG

    tokens: Annotated[int, Gt(0)]
    """Activation rows delivered to each trainer per site, after exclusion; steps = tokens // batch."""
    mix: tuple[SourceEntry, ...] = ()
    """Sources with weights. A single source may be written flat: `source: builtin/python-docs`."""
    context: Annotated[int, Ge(2)] = 128
    """Tokens a sequence."""
    repeat: bool = False
    """Start over when the text runs out; without it that is an error that names the rows available."""
    bos: Literal["sequence", "document", "none"] = "sequence"
    """Where a beginning-of-sequence token stands."""
    exclude: tuple[str | int, ...] = ("bos", "pad")
    """Tokens whose rows never reach a trainer or a metric: names of special tokens, or token ids."""
    template: Literal["chat"] | None = None
    """`chat`: each document becomes a turn in the model's chat template."""


@dataclass(frozen=True)
class EvalData:
    """One dataset for evaluators; context, BOS, exclusion and template are those of training."""

    __pydantic_config__ = _CONFIG

    mix: tuple[SourceEntry, ...]
    """As in training; a single source may be written flat. `split` is `heldout` unless given."""
    tokens: Annotated[int, Gt(0)] = 32_768
    """Activation rows, after exclusion."""


@dataclass(frozen=True)
class Data:
    """Text for training and for evaluation."""

    __pydantic_config__ = _CONFIG

    train: TrainData | None = None
    """Not needed when a recipe only evaluates `saes`."""
    eval: dict[str, EvalData] = field(default_factory=dict)
    """Name of the dataset -> text. `out_of_sample` is a domain that training never saw."""


@dataclass(frozen=True)
class Extract:
    """How activations are read and kept."""

    __pydantic_config__ = _CONFIG

    uses: str = "native/hf"
    """The extractor, as `plugin/name`."""
    with_: dict[str, Any] = field(default_factory=dict)
    """Its settings."""
    sites: tuple[str, ...] = ()
    """Tensors to read, such as `resid_post.6`; one forward pass serves all."""
    dtype: Number = "float32"
    """Type of the stream; half precision halves its size on disk."""
    normalize: Literal["none", "sqrt_d", "unit"] = "sqrt_d"
    """One factor per site, from calibration rows, so that the mean norm is sqrt(d), 1, or what it was; undone in the checkpoint."""
    lm_batch: Annotated[int, Gt(0)] = 32
    """Sequences in one forward pass of the language model."""
    block: Annotated[int, Gt(0)] = 131_072
    """Tokens in one shuffled block, excluded ones included; what an interrupted run re-reads at most."""
    calibration: Annotated[int, Ge(0)] = 16_384
    """Rows set apart for norms, initial biases and thresholds; never training rows."""
    store: Literal["auto", "none", "disk"] = "auto"
    """`none`: stream; `disk`: keep; `auto`: keep if it fits `store_limit` and half the free disk."""
    store_limit: Annotated[int, Ge(0)] = 4_000_000_000
    """Bytes that `store: auto` may keep; `2 GB` and `500 MiB` are understood."""


@dataclass(frozen=True)
class TrainEntry:
    """One SAE to train at each of its sites."""

    __pydantic_config__ = _CONFIG

    id: str
    """Name of the SAE: a folder in the run, and what filters and `--set` say."""
    uses: str
    """The trainer, as `plugin/name`."""
    with_: dict[str, Any] = field(default_factory=dict)
    """Its settings: architecture, width, sparsity, batch, learning rate."""
    site: str | None = None
    """One of `extract.sites`; without it, one SAE for every site."""
    target_site: str | None = None
    """Output site of a transcoder."""
    seed: Annotated[int, Ge(0)] | None = None
    """Instead of the recipe's seed."""
    init_from: str | None = None
    """Checkpoint folder to warm-start from."""
    sweep: dict[str, tuple[Any, ...]] | None = None
    """Lists over settings, `seed` or `site`: one SAE for every combination, called `{id}-k16-seed1`."""


@dataclass(frozen=True)
class Early:
    """A look at each SAE while it is trained, by the recipe's judge (an evaluator such as `native/verdict`), on the evaluation datasets."""

    __pydantic_config__ = _CONFIG

    at: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.1,)
    """Shares of the training rows after which to look; `[]` for never."""
    tokens: Annotated[int, Gt(0)] = 8_192
    """Rows of each evaluation dataset that are read for it."""
    stop_doomed: bool = False
    """Stop a job whose verdict is one that more training does not mend; its state is kept."""


@dataclass(frozen=True)
class SaeEntry:
    """A finished SAE to evaluate or export beside the trained ones."""

    __pydantic_config__ = _CONFIG

    id: str
    """Name, as for trained ones."""
    load: str
    """A checkpoint folder in any known format, or `hf://org/repo/path`."""
    site: str | None = None
    """Where it belongs, if its checkpoint does not say."""


@dataclass(frozen=True)
class UseEntry:
    """An evaluator or an exporter."""

    __pydantic_config__ = _CONFIG

    uses: str
    """The component, as `plugin/name`."""
    id: str | None = None
    """Name; the component's own unless given."""
    with_: dict[str, Any] = field(default_factory=dict)
    """Its settings."""
    saes: tuple[str, ...] | None = None
    """Ids that it applies to; all unless given. The id of a sweep stands for all its members."""


@dataclass(frozen=True)
class Recipe:
    """A whole job: model, text, sites, SAEs to train or load, evaluations, exports."""

    __pydantic_config__ = _CONFIG

    saehub: int
    """Version of the recipe format: 1."""
    name: str
    """Name of the run's folder."""
    description: str = ""
    """One line for `saehub recipe ls`."""
    model: ModelEntry | None = None
    """Needed by every component that runs a language model."""
    data: Data = field(default_factory=Data)
    """Text."""
    extract: Extract = field(default_factory=Extract)
    """Activations."""
    train: tuple[TrainEntry, ...] = ()
    """SAEs to train, all on the same stream."""
    early: Early = field(default_factory=Early)
    """The verdict during training."""
    saes: tuple[SaeEntry, ...] = ()
    """Finished SAEs."""
    evaluate: tuple[UseEntry, ...] = ()
    """Evaluators."""
    export: tuple[UseEntry, ...] = ()
    """Formats to export to."""
    seed: Annotated[int, Ge(0)] = 0
    """All randomness derives from it and from ids, but for the text under `data.eval`: that is the same for every seed."""
