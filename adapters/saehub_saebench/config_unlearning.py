"""The settings of `saebench/unlearning` in a recipe in; a checked, torch-free dataclass with SAEBench's own defaults out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from saehub_saebench.config import SEEDS, Autoencoders, _check_positive, _check_seeds, _files, _missing

if TYPE_CHECKING:
    from saehub_saebench.definitions import Definition

FORGET_FILE = "bio-forget-corpus.jsonl"
WMDP, MMLU, WIKITEXT = "cais/wmdp", "cais/mmlu", "wikitext"
TARGET = "wmdp-bio"


@dataclass(frozen=True)
class UnlearningConfig(Autoencoders):
    """Settings of `saebench/unlearning`; the defaults are SAEBench's, chosen for Gemma-2-2B-it. It needs an instruct model that knows the answers."""

    evaluator: ClassVar[str] = "unlearning"

    dataset_names: tuple[str, ...] = (TARGET, "high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")
    """Questions: `wmdp-bio`, to be unlearnt, and subjects of MMLU, to be kept."""
    data_dir: str | None = None
    """Folder that holds bio-forget-corpus.jsonl, and hub datasets under their names (`cais/wmdp` …); None: `data`, and for datasets the cache, or the hub."""
    forget: str | None = None
    """Text about what is to be forgotten: a file of lines {"text": …}. None: bio-forget-corpus.jsonl, which its authors hand out on request."""
    retain: str | None = None
    """Other text, likewise: latents that fire on it are left alone. None: wikitext-2, as in SAEBench."""
    questions: dict[str, str] = field(default_factory=dict)
    """Questions of your own in place of the hub's: name in `dataset_names` -> file of lines {"question": …, "choices": [4 texts], "answer": 0 to 3}."""
    question_ids: str | None = None
    """Folder like SAEBench's `question_ids`, of questions that the model is known to know; None: it is asked all, in every order of the choices."""
    retain_thresholds: tuple[float, ...] = (0.001, 0.01)
    """Latents that fire on more than this share of the tokens to retain are left alone."""
    n_features_list: tuple[int, ...] = (10, 20)
    """Latents that are clamped: those that fire most on the text to forget."""
    multipliers: tuple[int, ...] = (25, 50, 100, 200)
    """They are clamped to minus this wherever they fire, in units of the norm of their decoder rows."""
    dataset_size: int = 1024
    """Sequences on which firing is counted."""
    seq_len: int = 1024
    """Their length."""
    llm_batch_size: int = 4
    """Sequences in one forward pass; twice as many questions."""
    seeds: tuple[int, ...] = SEEDS
    """Which texts are read, and in what order."""

    def __post_init__(self) -> None:
        _check_seeds(self.seeds)
        _check_positive(self, "n_features_list", "multipliers", "dataset_size", "seq_len", "llm_batch_size")
        if not self.retain_thresholds or any(not 0 < value <= 1 for value in self.retain_thresholds):
            raise ValueError(f"retain_thresholds is {list(self.retain_thresholds)}; shares of tokens, above 0, are needed")
        kept = [name for name in self.dataset_names if name not in (TARGET, "college_biology")]
        if TARGET not in self.dataset_names or not kept:
            raise ValueError(f"dataset_names is {list(self.dataset_names)}; SAEBench needs {TARGET} to unlearn, and something to keep (it leaves college_biology out)")
        unknown = [name for name in self.questions if name not in self.dataset_names]
        if unknown:
            raise ValueError(f"questions names {', '.join(unknown)}, which dataset_names does not")

    def repositories(self) -> tuple[str, ...]:
        """Hub datasets that are needed beside one's own files."""
        asked = [WMDP if name == TARGET else MMLU for name in self.dataset_names if name not in self.questions]
        return tuple(dict.fromkeys([*asked, *([] if self.retain else [WIKITEXT])]))

    def forget_file(self) -> str:
        """Where the texts to forget are."""
        from pathlib import Path

        from saehub_saebench.hubdata import DATA_DIR

        return str(Path(self.forget or Path(self.data_dir or DATA_DIR) / FORGET_FILE).expanduser().absolute())

    def files(self) -> list[str]:
        """Texts and questions on this machine."""
        return _files(self.repositories(), self.data_dir, (self.forget_file(), self.retain, self.question_ids, *self.questions.values()))

    def how_to_get_the_corpus(self) -> str:
        """For errors and the plan."""
        from saehub_saebench.hubdata import DATA_DIR

        return (
            f"ask for {FORGET_FILE} (the form on https://huggingface.co/datasets/cais/wmdp-corpora) and put it into {self.data_dir or DATA_DIR}; "
            'or with: {forget: FILE} of lines {"text": …} of your own'
        )

    def warnings(self) -> list[str]:
        """For the plan: what would have to be fetched."""
        return _missing(self)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The subjects of MMLU that are asked."""
        return {MMLU: ("README.md", *(f"{name}/*" for name in self.dataset_names if name != TARGET and name not in self.questions))}

    @staticmethod
    def definitions() -> Mapping[str, Definition]:
        """Definition id -> title and formula, for reports."""
        from saehub_saebench.definitions import definitions

        return definitions("unlearning")
