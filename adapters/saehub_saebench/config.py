"""The settings of the saebench evaluators in a recipe in; checked, torch-free dataclasses with SAEBench's own defaults out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from saehub_saebench.lacking import of_the_wheel, unknown

if TYPE_CHECKING:
    from saehub.api import ModelShape, ModelSpec, PlannedSAE
    from saehub_saebench.definitions import Definition

SEEDS = (42, 43, 44)
"""SAEBench's own seed and two more: without them there is no error bar."""


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or any(not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds is {list(seeds)}; give one or more different whole numbers, such as [42, 43, 44]")


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(item is not None and item < 1 for item in values) or not values:
            raise ValueError(f"{name} is {value}; whole numbers from 1 are needed")


NO_HOOK = "{site} has no TransformerLens hook in a layer, and SAEBench knows no other address"


class Autoencoders:
    """What an eval of SAEBench takes: asked at plan, and again when the SAE is there (`admission.refusal`)."""

    row_wise: ClassVar[bool] = True
    """Whether it encodes single rows, so that an SAE that needs whole sequences cannot take part."""
    heads: ClassVar[bool] = False
    """Whether it knows sites whose rows are attention heads side by side."""
    only: ClassVar[str | None] = None
    """The one kind of site (such as `resid_post`) that it reads, whatever it is told."""

    evaluator: ClassVar[str] = ""
    """The component's name."""

    def lacking(self, model: ModelSpec | None, shape: ModelShape | None) -> Iterable[tuple[str, str, str]]:
        """What this machine lacks: asked at plan."""
        from saehub_saebench import lacking

        return lacking.of(self.evaluator, self, model, shape)

    def refusal(self, sae: PlannedSAE) -> str | None:
        """Why an SAE will not be measured, or None."""
        if sae.kind not in (None, "autoencoder") or sae.target_site not in (None, sae.site):
            word = "skip_transcoder" if sae.kind == "skip_transcoder" else "transcoder"
            return f"SAEBench puts the reconstruction back where it read: a {word} predicts another site"
        if self.row_wise and not sae.row_wise:
            return f"SAEBench encodes single rows here; {sae.architecture} needs whole sequences"
        return None if sae.site is None else self.site_refusal(sae.site)

    def site_refusal(self, site: str) -> str | None:
        """Why a site, in its canonical form, cannot be measured, or None."""
        from saehub.errors import UsageError
        from saehub.sites import Site

        try:
            parsed = Site.parse(site)
        except UsageError:
            return None  # a name of the user's own files, which only a run can judge
        if parsed.kind is None or parsed.layer is None:
            return NO_HOOK.format(site=site)
        if parsed.kind == "attn_z" and not self.heads:
            return "SAEBench reads hook_z here as heads × width, not as rows"
        if self.only is not None and parsed.kind != self.only:
            return f"SAEBench reads {self.only} of the layer here whatever site the SAE is of; {site} would be measured on the wrong tensor"
        return None


@dataclass(frozen=True)
class CoreConfig(Autoencoders):
    """Settings of `saebench/core`: the paper's are 200 and 2000 batches of 16 × 128 tokens of openwebtext."""

    row_wise: ClassVar[bool] = False
    heads: ClassVar[bool] = True

    n_eval_reconstruction_batches: int | None = None
    """Batches for cross-entropy and KL under each seed; None: all whole batches there are."""
    n_eval_sparsity_variance_batches: int | None = None
    """Batches for reconstruction and sparsity under each seed; None: all whole batches there are."""
    batch_size_prompts: int = 16
    """Sequences a batch. SAEBench's `mse` and legacy explained variance depend on it: 16 in everything published."""
    exclude_special_tokens_from_reconstruction: bool = True
    """Leave BOS, EOS and padding rows as they are when the reconstruction is put into the model, as in the paper."""
    seeds: tuple[int, ...] = SEEDS
    """Each seed reads sequences of its own: the dataset is shuffled once and cut into as many parts as there are seeds."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches", "batch_size_prompts")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("core")


@dataclass(frozen=True)
class MetaStructureConfig(Autoencoders):
    """Settings of `saebench/meta_structure`."""

    row_wise: ClassVar[bool] = False

    width_ratio: float = 0.25
    """Latents of the meta-SAE, as a share of the SAE's."""
    k: int = 4
    """Active meta-latents a decoder row, on average."""
    train_steps: int = 1500
    """Steps of the meta-SAE's training."""
    train_batch_size: int = 1024
    """Decoder rows a step."""
    learning_rate: float = 5e-4
    """Adam's."""
    seeds: tuple[int, ...] = SEEDS
    """Initialisation and batches of the meta-SAE."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "k", "train_steps", "train_batch_size")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("meta_structure")


SMALL_PROBES = ("117_us_state_FL", "118_us_state_CA", "119_us_state_TX")
"""Short texts, a thousand each: seconds on a small model. The paper's set is all 113."""


@dataclass(frozen=True)
class SaeProbesConfig(Autoencoders):
    """Settings of `saebench/sae_probes`."""

    dataset_names: tuple[str, ...] = SMALL_PROBES
    """Of the 113 in the sae-probes wheel; `all` for all of them. The default is three small ones."""
    ks: tuple[int, ...] = (1, 2, 5)
    """Latents that a probe may use."""
    reg_type: Literal["l1", "l2"] = "l1"
    """Penalty of the probe; its strength is cross-validated."""
    include_llm_baseline: bool = True
    """Also probe the activations themselves."""
    baseline_method: str = "logreg"
    """How."""
    max_seq_len: int = 1024
    """Tokens of a text that are read, at most (from its end)."""
    llm_batch_size: int = 32
    """Texts in one forward pass."""
    seeds: tuple[int, ...] = SEEDS
    """Splits into training and test texts."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "ks", "max_seq_len", "llm_batch_size")
        if not self.dataset_names:
            raise ValueError("dataset_names is empty; name one or more, such as [117_us_state_FL]")
        known = of_the_wheel()
        if known and self.dataset_names != ("all",):
            unknown(self.dataset_names, known, "sae-probes", "")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("sae_probes")


BIOS, AMAZON = "LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"
PROBING = (
    BIOS,
    "LabHC/bias_in_bios_class_set2",
    "LabHC/bias_in_bios_class_set3",
    AMAZON,
    f"{AMAZON}_sentiment",
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)


def _missing(config: Autoencoders) -> list[str]:
    from saehub_saebench import hubdata, lacking

    return hubdata.warnings(lacking.names(config), config.data_dir, config.evaluator, lacking.parts(config))


def _files(names: tuple[str, ...], data_dir: str | None, own: Iterable[str | None] = ()) -> list[str]:
    """Local files and folders that decide the numbers: their contents are part of what a cached result is found by."""
    from pathlib import Path

    from saehub_saebench import hubdata

    folders = [hubdata.local_folder(repo, data_dir) for repo in dict.fromkeys(map(hubdata.repository, names))]
    return [str(path) for path in (*(Path(path).expanduser() for path in own if path), *folders) if path is not None]


def _check_among(name: str, values: tuple[int, ...], allowed: tuple[int, ...]) -> None:
    odd = [value for value in values if value not in allowed]
    if odd or not values:
        raise ValueError(f"{name} is {list(values)}; SAEBench's result has places for {list(allowed)} only")


@dataclass(frozen=True)
class SparseProbingConfig(Autoencoders):
    """Settings of `saebench/sparse_probing`: the defaults are the paper's."""

    evaluator: ClassVar[str] = "sparse_probing"

    dataset_names: tuple[str, ...] = PROBING
    """SAEBench's datasets by their names there, and keys of `labelled`."""
    labelled: dict[str, str] = field(default_factory=dict)
    """Datasets of your own: name -> folder with train.jsonl and test.jsonl, lines of {"text": …, "label": …}."""
    data_dir: str | None = None
    """Folder that holds hub datasets under their names (`LabHC/bias_in_bios/…`); None: the cache, or the hub."""
    probe_train_set_size: int = 4000
    """Training texts of each probe."""
    probe_test_set_size: int = 1000
    """Test texts of each probe."""
    context_length: int = 128
    """Tokens of a text that are read."""
    k_values: tuple[int, ...] = (1, 2, 5)
    """Latents that a probe may use."""
    sae_batch_size: int = 125
    """Texts encoded at once."""
    llm_batch_size: int = 32
    """Texts in one forward pass."""
    lower_vram_usage: bool = False
    """Keep activations on the CPU."""
    seeds: tuple[int, ...] = SEEDS
    """Samples of texts, and the probes' batches."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "probe_train_set_size", "probe_test_set_size", "context_length", "sae_batch_size", "llm_batch_size")
        _check_among("k_values", self.k_values, (1, 2, 5, 10, 20, 50, 100))
        if not self.dataset_names:
            raise ValueError("dataset_names is empty; name one or more")
        unknown(self.published(), PROBING, "SAEBench", ", or your own texts: labelled: {NAME: FOLDER}")

    def published(self) -> tuple[str, ...]:
        """Datasets that SAEBench fetches itself."""
        return tuple(name for name in self.dataset_names if name not in self.labelled)

    def files(self) -> list[str]:
        """Datasets on this machine."""
        return _files(self.published(), self.data_dir, self.labelled.values())

    def warnings(self) -> list[str]:
        """For the plan: datasets that would have to be fetched."""
        return _missing(self)

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("sparse_probing")


@dataclass(frozen=True)
class _PerturbationConfig(Autoencoders):
    """What SCR and TPP share; the defaults are the paper's."""

    dataset_names: tuple[str, ...] = (BIOS, AMAZON)
    """The two that SAEBench knows here."""
    data_dir: str | None = None
    """Folder that holds hub datasets under their names (`LabHC/bias_in_bios/…`); None: the cache, or the hub."""
    n_values: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 500)
    """Latents that are zero-ablated."""
    train_set_size: int = 4000
    """Training texts of each probe."""
    test_set_size: int = 1000
    """Test texts of each probe."""
    context_length: int = 128
    """Tokens of a text that are read."""
    probe_train_batch_size: int = 16
    """SAEBench: do not change; it decides how much of the spurious correlation the probe learns."""
    probe_epochs: int = 20
    """Epochs of the probes' training."""
    sae_batch_size: int = 125
    """Texts encoded at once."""
    llm_batch_size: int = 32
    """Texts in one forward pass."""
    lower_vram_usage: bool = False
    """Keep the model on the CPU while it is not needed."""
    seeds: tuple[int, ...] = SEEDS
    """Samples of texts, and the probes."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "train_set_size", "test_set_size", "context_length", "probe_train_batch_size", "probe_epochs", "sae_batch_size", "llm_batch_size")
        _check_among("n_values", self.n_values, (2, 5, 10, 20, 50, 100, 500))
        if not self.dataset_names:
            raise ValueError("dataset_names is empty; name one or both of SAEBench's")
        unknown(self.dataset_names, (BIOS, AMAZON), "SAEBench", " here")

    def files(self) -> list[str]:
        """Datasets on this machine."""
        return _files(self.dataset_names, self.data_dir)


@dataclass(frozen=True)
class ScrConfig(_PerturbationConfig):
    """Settings of `saebench/scr`."""

    evaluator: ClassVar[str] = "scr"

    pairs: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Dataset -> pairs of classes that are made spuriously correlated; SAEBench's four pairs each unless given."""

    def warnings(self) -> list[str]:
        """For the plan: the published caution, and datasets that would have to be fetched."""
        from saehub_saebench.definitions import CAUTION

        return [f"saebench/scr: {CAUTION}", *_missing(self)]

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("scr")


@dataclass(frozen=True)
class TppConfig(_PerturbationConfig):
    """Settings of `saebench/tpp`."""

    evaluator: ClassVar[str] = "tpp"

    def warnings(self) -> list[str]:
        """For the plan: the published caution, and datasets that would have to be fetched."""
        from saehub_saebench.definitions import CAUTION

        return [f"saebench/tpp: {CAUTION}", *_missing(self)]

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("tpp")


@dataclass(frozen=True)
class AbsorptionConfig(Autoencoders):
    """Settings of `saebench/absorption`; the defaults are SAEBench's. Models of at least 2 billion parameters are recommended."""

    only: ClassVar[str | None] = "resid_post"

    f1_jump_threshold: float = 0.03
    """A further latent counts as a split of the letter where it adds so much F1."""
    max_k_value: int = 10
    """Latents that may together make up a letter."""
    prompt_template: str = "{word} has the first letter:"
    """Context in which a word is read."""
    prompt_token_pos: int = -6
    """Position of the word's token, from the end of the prompt."""
    llm_batch_size: int = 10
    """Prompts in one forward pass."""
    k_sparse_probe_l1_decay: float = 0.01
    """L1 penalty of the probe that chooses latents."""
    k_sparse_probe_batch_size: int = 4096
    """Its batch."""
    k_sparse_probe_num_epochs: int = 50
    """Its epochs."""
    min_GT_probe_f1: float = 0.6
    """A letter counts where a probe on the activations tells it with this F1."""
    min_feats_for_eval: int = 20
    """Letters that must count."""
    eval_k_sparse_probe_batch_size: int = 24
    """Words scored at once."""
    precalc_k_sparse_probe_sae_acts: bool = True
    """Encode each word once: faster, more memory, the same numbers."""
    seeds: tuple[int, ...] = SEEDS
    """Splits, probes and example words; SAEBench ignores its own seed, these are set from outside."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "max_k_value", "llm_batch_size", "k_sparse_probe_num_epochs", "min_feats_for_eval")
        if "{word}" not in self.prompt_template or self.prompt_token_pos >= 0:
            raise ValueError(f"prompt_template is {self.prompt_template!r}, prompt_token_pos {self.prompt_token_pos}; it holds {{word}}, and the position is negative")

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("absorption")


@dataclass(frozen=True)
class AutointerpConfig(Autoencoders):
    """Settings of `saebench/autointerp`; the paper's, but for the text, which is the recipe's (there: 2 million tokens of the Pile)."""

    evaluator: ClassVar[str] = "autointerp"

    n_latents: int = 1000
    """Latents that are explained and judged; all living ones, where there are fewer."""
    dead_latent_threshold: float = 15
    """Firings below which a latent is left out."""
    buffer: int = 10
    """Tokens shown on each side of a position."""
    llm_batch_size: int = 32
    """Sequences in one forward pass."""
    n_top_ex_for_generation: int = 10
    """Strongest windows shown for an explanation."""
    n_iw_sampled_ex_for_generation: int = 5
    """Windows drawn by activation, shown for an explanation."""
    n_top_ex_for_scoring: int = 2
    """Strongest windows among those to sort."""
    n_random_ex_for_scoring: int = 10
    """Random windows among those to sort."""
    n_iw_sampled_ex_for_scoring: int = 2
    """Windows drawn by activation among those to sort."""
    base_url: str | None = None
    """OpenAI-compatible address of the judge; None: OPENAI_BASE_URL, or OpenAI itself."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    seeds: tuple[int, ...] = SEEDS
    """Latents and windows that are drawn."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "n_latents", "buffer", "llm_batch_size", "n_top_ex_for_generation", "n_random_ex_for_scoring")

    def warnings(self) -> list[str]:
        """For the plan: what it costs."""
        return [f"saebench/autointerp asks a judge about up to {self.n_latents:,} latents an SAE and seed: two requests each, paid for where the judge is"]

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("autointerp")


RAVEL_PROMPTS = "adamkarvonen/ravel_prompts"


@dataclass(frozen=True)
class RavelConfig(Autoencoders):
    """Settings of `saebench/ravel`; the defaults are the paper's."""

    evaluator: ClassVar[str] = "ravel"

    only: ClassVar[str | None] = "resid_post"

    entity_attribute_selection: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "city": ("Country", "Continent", "Language"),
            "nobel_prize_winner": ("Country of Birth", "Field", "Gender"),
        }
    )
    """Entity type -> attributes that are to be told apart."""
    data_dir: str | None = None
    """Folder that holds adamkarvonen/ravel_prompts; None: the hub."""
    top_n_entities: int = 500
    """Entities, those that the model knows best."""
    full_dataset_downsample: int | None = None
    """Prompts drawn before the model completes them; None: all."""
    num_pairs_per_attribute: int = 5000
    """Pairs of prompts an attribute."""
    train_test_split: float = 0.7
    """Share of the pairs on which the mask of latents is trained."""
    learning_rate: float = 1e-3
    """Of the mask."""
    num_epochs: int = 2
    """Of the mask's training."""
    n_generated_tokens: int = 6
    """Tokens of an answer."""
    llm_batch_size: int = 32
    """Prompts in one forward pass; SAEBench: it changes the mask, keep it the same in comparisons."""
    seeds: tuple[int, ...] = SEEDS
    """Pairs, and the mask's batches."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "top_n_entities", "num_pairs_per_attribute", "num_epochs", "n_generated_tokens", "llm_batch_size")
        if any(len(names) < 2 for names in self.entity_attribute_selection.values()):
            raise ValueError(f"entity_attribute_selection is {dict(self.entity_attribute_selection)}; isolation needs two attributes of each entity type")

    def files(self) -> list[str]:
        """Prompts on this machine."""
        return _files((RAVEL_PROMPTS,), self.data_dir)

    def warnings(self) -> list[str]:
        """For the plan: prompts that would have to be fetched."""
        return _missing(self)

    def repositories(self) -> tuple[str, ...]:
        """Where its prompts are."""
        return (RAVEL_PROMPTS,)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The prompts of the chosen entities."""
        return {RAVEL_PROMPTS: tuple(f"ravel_{entity}_*.json" for entity in self.entity_attribute_selection)}

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("ravel")
