"""The words that core and plugins share: what a component registers, what it is given and what it returns; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from saehub.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE
    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset

API_VERSION = 1
KINDS = ("extractor", "trainer", "evaluator", "exporter")
NEEDS = frozenset({"activations", "tokens", "sequences", "model", "several_saes", "measurements"})


@dataclass(frozen=True)
class Component:
    """One thing a plugin offers: registered as data, loaded only when a stage runs it."""

    name: str
    """Name within the plugin; the address in a recipe is `plugin/name`."""
    target: str
    """`"package.module:Class"`; called as `Class(config)`."""
    config: str | None = None
    """`"package.config:Dataclass"`, a frozen, torch-free dataclass that validates `with:`; None: the component takes no settings.

    A class attribute `EXAMPLE: ClassVar[dict]` holds settings that `saehub plugins check` tries it with, where some have no default."""
    requires: tuple[str, ...] = ()
    """Import names of third-party libraries. Not empty: the component runs in a worker process of its plugin's own."""
    extra: str | None = None
    """The extra that installs `requires`: `pip install 'saehub[extra]'`."""
    summary: str = ""
    """One line for `saehub plugins ls`."""
    needs: tuple[str, ...] = ()
    """What it must be given, out of `NEEDS`; checked at plan."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables the worker sets before it imports anything."""
    cache_version: int = 1
    """Raise it when the same settings would give other results: it enters the stage key."""
    api: int = API_VERSION
    """The API version it was written for."""


@dataclass(frozen=True)
class ArchitectureEntry:
    """An architecture of a plugin: how its SAEs are loaded (built-in ones use the same entry)."""

    name: str
    """The word in `saehub.json`, such as `topk`."""
    target: str
    """`"package.module:Class"`, a subclass of `saehub.SAE`."""
    summary: str = ""
    """One line: the equation."""


@dataclass(frozen=True)
class ModelSpec:
    """Which language model, and how it is run."""

    name: str
    """`builtin/tiny-llama`, a Hugging Face id, or a local directory."""
    revision: str | None = None
    """Hub revision; None means `main`, recorded as the commit that it resolved to."""
    dtype: str = "float32"
    """Weights and activations of the model: float32, bfloat16 or float16."""
    device: str = "auto"
    """`auto` (cuda, then mps, then cpu), or a torch device name."""
    attention: str = "sdpa"
    """Attention implementation, `sdpa` or `eager`: numerics differ in the last bits, so it enters the stage key."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer, as far as a plan needs them; read from config.json or declared in a recipe."""

    family: str
    """Key of `saehub.sites.FAMILIES`: `llama` (Llama, Gemma 1, Qwen, Mistral), `gemma2` (Gemma 2 and 3), `gpt2`, `gpt_neox`, `gpt_neox_sequential`, `bert`, `roberta`; or `other`."""
    n_layers: int
    """Transformer blocks."""
    d_model: int
    """Residual width."""
    d_mlp: int
    """Width of the MLP's hidden layer."""
    n_heads: int
    """Attention heads."""
    d_head: int
    """Width of one head (`attn_z` has n_heads * d_head)."""
    vocab: int
    """Vocabulary size."""
    context: int
    """Longest sequence the model accepts."""


@dataclass
class Rows:
    """The activation rows of one language-model batch, in sequence order, before exclusion (n = sequences * context)."""

    acts: dict[str, Tensor]
    """site -> [n, d] in the model's dtype."""
    keep_N: Tensor
    """bool [n]; False on excluded rows (BOS, padding, the user's list)."""
    token_ids_N: Tensor | None = None
    """int64 [n]; None where the source has no tokens."""
    positions_N: Tensor | None = None
    """int64 [n], position within the sequence."""
    sequences_N: Tensor | None = None
    """int64 [n], index of the sequence in its dataset."""


class ExtractorSession(Protocol):
    """An open extractor: batch `i` is a pure function of `i`.

    Optional: `concurrent = True` says that `rows` may run in one background thread while the hub's own thread trains, or runs the same model;
    then the hub makes the next block while trainers use the last.
    """

    widths: dict[str, int]
    """site -> d."""
    n_batches: int
    """Language-model batches available (one epoch)."""

    def rows(self, batch: int) -> Rows:
        """The rows of language-model batch `batch` (0-based), all sites from one forward pass."""
        ...

    def kept(self, batch: int) -> int:
        """How many rows of that batch survive exclusion, without running the model."""
        ...

    def close(self) -> None:
        """Release hooks, files and memory."""
        ...


class Extractor(Protocol):
    """Turns a model and tokens into activation rows.

    Its config dataclass may have a torch-free `refusal(site, shape) -> str | None`, used at plan: why it cannot read that site of a model
    with those sizes (`ModelShape`).

    One whose registration does not need `tokens` brings its own rows: its config then has a torch-free `describe() -> dict` with `widths`
    (site -> d), `rows` (after exclusion) and `hash` (of everything that decides them), which a plan asks for; `lm_batch` counts rows.
    """

    def __init__(self, config: Any): ...

    def open(self, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], *, lm_batch: int) -> ExtractorSession:
        """Start reading `sites` (canonical strings such as `resid_post.2`) with `lm_batch` sequences a forward pass."""
        ...


@dataclass(frozen=True)
class Job:
    """One SAE to train: everything a trainer may know, torch-free so that a plan can check it."""

    id: str
    """Unique in the recipe; all randomness derives from it and `seed`."""
    site: str
    """Input site."""
    target_site: str | None
    """Output site of a transcoder; None for an autoencoder."""
    d_in: int
    """Input width."""
    d_out: int
    """Output width (= d_in for an autoencoder)."""
    steps: int
    """Optimizer steps: rows // batch, fixed before work starts."""
    batch: int
    """Rows a step."""
    rows: int
    """Rows the stream delivers."""
    seed: int
    """From the recipe."""
    calibration: int = 0
    """Calibration rows that exist (0: unknown)."""
    device: str = "cpu"
    """Torch device of the parameters (runtime, not in the key)."""
    init_from: str | None = None
    """Checkpoint directory to warm-start from."""
    normalize: str = "none"
    """`extract.normalize`: the hub's scale, already applied to the rows and undone in the checkpoint (the stream's key holds it)."""


class TrainerSession(Protocol):
    """One SAE being trained; the hub feeds it batches and can stop and restore it between any two of them."""

    def step(self, x_BD: Tensor, y_BD: Tensor | None = None) -> None:
        """One optimizer step on float32 rows [batch, d_in] (targets [batch, d_out] for a transcoder). Must not change its inputs."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last step: at least `loss`; `fvu`, `l0`, `dead` (share), `lr` where known."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that `load_state` needs to go on bit-identically: tensors, and JSON-able data."""
        ...

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Continue from what `state` returned."""
        ...

    def finish(self) -> SAE:
        """The trained SAE, in the units of the rows it was given; float32."""
        ...


class Calibration(Protocol):
    """Rows apart from the training rows, for norms, `b_dec` and thresholds."""

    def __call__(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The first `n` calibration rows (x_ND, y_ND or None), float32, already normalised; an error that says how many exist."""
        ...


@dataclass(frozen=True)
class CalibrationRows:
    """The `Calibration` of the hub: rows in memory."""

    x_ND: Tensor
    """float32 [n, d_in]."""
    y_ND: Tensor | None = None
    """float32 [n, d_out]; None for an autoencoder."""

    def __call__(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The first `n` rows."""
        if n > self.x_ND.shape[0]:
            raise UsageError(
                f"{n} calibration rows were asked for and {self.x_ND.shape[0]} exist", where="extract.calibration", fix=f"extract.calibration: {n}"
            )
        return self.x_ND[:n], None if self.y_ND is None else self.y_ND[:n]


class Trainer(Protocol):
    """Trains SAEs on the hub's stream.

    Its config dataclass has `batch: int` and may have torch-free methods, used at plan: `check(job) -> Iterable[str]` (problems; empty
    when it can do the job), `d_sae(job) -> int`, `architecture() -> str`, `memory(job) -> int` (bytes).

    What its user would not know, such as a defect of the library behind it, belongs in one of two optional methods; each sentence is
    shown once a run as a warning, and stands in the run card and in the checkpoint's provenance:
    `config.cautions(job) -> Iterable[str]`, known at plan; `session.cautions() -> Iterable[str]`, known when training has ended.
    `config.inexact_resume(job) -> str | None` says what holds instead, where a resumed run does not end bit-identical.
    """

    def __init__(self, config: Any): ...

    def open(self, job: Job, calibration: Calibration) -> TrainerSession:
        """Initialise one SAE."""
        ...


class LoopSession(Protocol):
    """One SAE being trained by a trainer that runs the language model itself."""

    def advance(self) -> None:
        """One optimizer step, on the next sequences."""
        ...

    def metrics(self) -> dict[str, float]:
        """As `TrainerSession.metrics`."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What `load_state` needs to go on: tensors, and JSON-able data."""
        ...

    def load_state(self, tensors: dict[str, Tensor], data: dict) -> None:
        """Continue from what `state` returned."""
        ...

    def finish(self) -> SAE:
        """The trained SAE, in the model's own units; float32."""
        ...


class LoopTrainer(Protocol):
    """Trains an SAE through the language model, in a loop of its own: a trainer whose registration `needs` the model.

    It gets no rows: it shares no stream with other jobs, `extract.normalize` does not apply, and a resumed run is not promised to end
    bit-identical. A step takes `batch` token positions, `batch // context` sequences. Its config may have, beside a `Trainer`'s methods,
    `check_model(job, shape, context) -> Iterable[str]`: problems that the model's sizes (`ModelShape`) and the sequence length tell.
    """

    def __init__(self, config: Any): ...

    def open(self, job: Job, model: ModelHandle, tokens: TokenDataset) -> LoopSession:
        """Initialise one SAE; the training sequences are those after `tokens.calibration_sequences`."""
        ...


def owns_its_loop(component: Component) -> bool:
    """Whether a trainer runs the model itself (`LoopTrainer`)."""
    return "model" in component.needs


@dataclass
class Subject:
    """One SAE under evaluation."""

    id: str
    sae: SAE
    path: Path
    site: str
    target_site: str | None
    hash: str
    """SHA-256 over the tensors' hashes."""


@dataclass(frozen=True)
class PlannedSAE:
    """What a plan knows of an SAE, before it is trained or loaded; None where it does not know. Torch-free."""

    id: str
    architecture: str | None = None
    """The word in `saehub.json`."""
    kind: str | None = None
    """`autoencoder`, `transcoder` or `skip_transcoder`."""
    site: str | None = None
    target_site: str | None = None
    d_in: int | None = None
    d_out: int | None = None
    row_wise: bool = True
    """False for an architecture that needs whole sequences."""


@dataclass
class EvalDataset:
    """One dataset of the recipe's `data.eval`."""

    name: str
    """`in_sample`, `out_of_sample`, or the user's word."""
    tokens: TokenDataset
    hash: str
    """SHA-256 of the token ids."""


@dataclass
class EvalContext:
    """What an evaluator is given."""

    subjects: list[Subject]
    model: ModelHandle | None
    datasets: dict[str, EvalDataset]
    seed: int
    device: str
    work_dir: Path
    """A private folder for scratch files."""
    lm_batch: int = 32
    emit: Callable[[dict], None] = lambda event: None
    """Progress: `emit({"progress": 0.4, "text": "…"})`."""
    rows: Callable[[EvalDataset, Sequence[str]], Iterator[Rows]] | None = None
    """The recipe's extractor over a dataset: `rows(dataset, sites)` yields one `Rows` a language-model batch."""
    measured: Sequence[Measurement] = ()
    """What other evaluators of the run found about these SAEs, for an evaluator that needs `measurements`: it runs after them."""
    cautions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """SAE -> what the hub warns of before it is measured, such as a site that it fits better; for the same evaluators."""


@dataclass(frozen=True)
class Measurement:
    """One number with everything needed to believe it."""

    metric: str
    """Such as `fvu`."""
    value: float | None
    """None when `status` is not `ok`."""
    subjects: tuple[str, ...]
    """Ids of the SAEs (one, but for metrics that compare SAEs)."""
    evaluator: str
    """`plugin/name`."""
    definition: str
    """Id of the definition, such as `saehub.fvu/1`; the same id always means the same formula."""
    subject_hashes: tuple[str, ...] = ()
    site: str | None = None
    dataset: str | None = None
    dataset_hash: str | None = None
    stderr: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int | None = None
    unit_of_n: str = "sequences"
    better: Literal["higher", "lower", "none"] = "none"
    version: str = ""
    """Version of the evaluator's distribution."""
    seed: int | None = None
    status: Literal["ok", "failed", "not_measured"] = "ok"
    reason: str | None = None
    """Why it failed or was not measured."""
    note: str | None = None
    """A caveat that must be shown with the number."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Per-sequence numerators and denominators (lists), histograms: for paired comparisons, not for the table."""

    def wrong(self) -> str | None:
        """Which field is of a wrong type, in words: plain numbers (no tensors, no NumPy scalars), text, tuples of text, a map of parts; else None."""
        texts = ("metric", "evaluator", "definition", "unit_of_n", "version", "site", "dataset", "dataset_hash", "reason", "note")
        kinds = {
            **dict.fromkeys(texts, (str, "text")), **dict.fromkeys(("value", "stderr", "ci_low", "ci_high"), ((int, float), "a number")),
            **dict.fromkeys(("n", "seed"), ((int, float), "a number")), "parts": (Mapping, "a map"),
        }  # fmt: skip
        for name, (kind, words) in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                return f"its {name} is {value!r:.80}, a {type(value).__name__}; expected {words}"
        for name in ("subjects", "subject_hashes"):
            if not isinstance(value := getattr(self, name), tuple) or not all(isinstance(one, str) for one in value):
                return f"its {name} is {value!r:.80}; expected a tuple of text"
        for name, words in (("status", ("ok", "failed", "not_measured")), ("better", ("higher", "lower", "none"))):
            if (value := getattr(self, name)) not in words:
                return f"its {name} is {value!r:.80}; expected one of {', '.join(words)}"
        return "its value is None, and its status ok" if self.status == "ok" and self.value is None else None

    def to_json(self) -> dict:
        """Plain data; NaN and infinities become None with status `failed`."""
        data = asdict(self)
        for name in ("value", "stderr", "ci_low", "ci_high"):
            number = data[name]
            if number is not None and not (abs(number) < float("inf")):
                data[name] = None
                if name == "value":
                    data["status"], data["reason"] = "failed", data["reason"] or f"the value is {number}"
        return data


class Evaluator(Protocol):
    """Measures SAEs; rows it cannot measure come back as `not_measured` with a reason, never left out silently.

    Its config dataclass may have a torch-free `refusal(sae: PlannedSAE) -> str | None`: why it cannot measure such an SAE. It is asked at
    plan, which warns of each pair that it refuses; the results say the same reason. `lacking(model: ModelSpec, shape: ModelShape) ->
    Iterable[tuple[str, str, str]]` says what this machine lacks (a key, a dataset): the setting it belongs to (or ""), what, and the fix.
    The plan refuses; where not even the model is here it warns, because the run will be elsewhere.

    One that needs `measurements` judges what others measured (`context.measured`); its config dataclass may name them in a class variable
    `reads` (address -> settings), which is what `saehub eval` and the early look of a training run before it.
    """

    def __init__(self, config: Any): ...

    def evaluate(self, context: EvalContext) -> Iterable[Measurement]:
        """All measurements for `context.subjects`."""
        ...


@runtime_checkable
class Exporter(Protocol):
    """A codec for another library's checkpoint folder.

    `sniff`, `read` and `write` run in saehub's own process and must not import the library; `run` runs in the plugin's worker. An optional
    `refusal(sae) -> str | None` says why an SAE cannot be written, before any work. An optional `files` names the files of a folder, so
    that one which lacks some is told which.
    """

    def __init__(self, config: Any): ...

    def sniff(self, path: Path) -> bool:
        """Whether `path` is this format; cheap, never raises on foreign files."""
        ...

    def read(self, path: Path) -> SAE:
        """The SAE, bit-exact in the stored tensors."""
        ...

    def write(self, sae: SAE, path: Path) -> Mapping[str, Any]:
        """Write a folder; returns notes: `{"folded": […], "dropped": […], "bit_exact": [tensor names]}`. Refuses what it cannot say."""
        ...

    def run(self, path: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, d_sae] and reconstruction [n, d_out] of float32 rows, computed with the target library's own code."""
        ...


class ResultFormat(Protocol):
    """Another library's result files. `sniff` and `read` run in saehub's own process and must not import the library; `write` runs in the
    plugin's worker."""

    def __init__(self, config: Any): ...

    def sniff(self, path: Path) -> bool:
        """Whether `path` is such a file, or a folder of them; cheap, never raises on foreign files."""
        ...

    def read(self, path: Path) -> Iterable[Measurement]:
        """What the files say, as measurements of saehub's evaluators where they mean the same."""
        ...

    def write(self, measurements: Sequence[Measurement], folder: Path) -> Mapping[str, Sequence[str]]:
        """Write what the format can say below `folder`, validated by the library; `{"files": [paths], "left_out": [sentences]}`."""
        ...
