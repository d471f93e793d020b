"""SAEs, an instruct model, text to forget and to retain, and questions on both in; how well clamped latents unlearn, as SAEBench scores it, out."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saehub.api import EvalContext
from saehub.errors import StageFailed, UsageError
from saehub.jsonio import hash_json, sha256_file
from saehub_saebench import hubdata
from saehub_saebench.config_unlearning import TARGET, UnlearningConfig
from saehub_saebench.definitions import BY_EVALUATOR
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.isolation import replaced
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE

GEMMA = "gemma-2-2b-it"
"""The name under which SAEBench formats prompts, and reads ` A` beside `A`."""
ANSWERS = tuple("ABCD") + tuple(f" {letter}" for letter in "ABCD")
CORPUS = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl")
"""Where SAEBench opens the text to forget, below the working folder."""
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class Unlearning(BenchEvaluator):
    """`saebench/unlearning`. Which questions the model knows, and its answers without an SAE, are found once for all SAEs and seeds; prompts are
    in the model's own chat template, which for Gemma 2 is SAEBench's only one."""

    name = "unlearning"
    remembers = True

    def __init__(self, config: UnlearningConfig | None = None):
        super().__init__(config or UnlearningConfig())
        self._forget = Path(self.config.forget_file())

    def metrics(self) -> list[str]:
        """Its score, and how much of the sweep it could choose from."""
        return list(BY_EVALUATOR[self.name])

    def note(self, sae: BenchSAE) -> str | None:
        """Also that prompts are not in the one format that SAEBench knows."""
        other = None if self._prompt == _gemma() else "prompts are in this model's chat template; SAEBench itself knows Gemma 2's only"
        return "; ".join(filter(None, (other, super().note(sae)))) or None

    # Before work

    def check(self, context: EvalContext) -> None:
        """An instruct model whose prompts SAEBench can put, and every text and question."""
        self._prompt = prompt_format(context.model.tokenizer, context.model.spec.name)
        self._own = {name: questions(Path(path)) for name, path in self.config.questions.items()}
        hubdata.require(self.config.repositories(), self.config.data_dir, self.name, self.config.parts())
        if not self._forget.is_file():
            raise StageFailed(
                f"saebench/unlearning needs text about what is to be forgotten, and {self._forget} is not there",
                where="forget" if self.config.forget else "data_dir",
                why="SAEBench's is handed out by its authors, on request only",
                fix=self.config.how_to_get_the_corpus(),
            )
        if self.config.question_ids and not Path(self.config.question_ids).is_dir():
            raise UsageError(f"{self.config.question_ids} is no folder", where="question_ids", fix="a folder with all/wmdp-bio_correct.csv …, or none")
        for path in filter(None, (self._forget, self.config.retain and Path(self.config.retain).expanduser())):
            texts(path)

    # Once for all SAEs

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """The questions that the model knows, and its answers to them: no SAE and no seed enters."""
        from sae_bench.evals.unlearning.utils.feature_activation import get_shuffled_forget_retain_tokens
        from sae_bench.evals.unlearning.utils.metrics import get_baseline_metrics, save_target_question_ids

        kept = Path(context.work_dir).absolute() / "unlearning-questions"
        if seed == self.config.seeds[0]:
            shutil.rmtree(kept, ignore_errors=True)
            (kept / "data").mkdir(parents=True)
            if self.config.question_ids:
                shutil.copytree(Path(self.config.question_ids).expanduser(), kept / "data" / "question_ids")
            asked = Asked(model)
            with self._texts():
                found = get_shuffled_forget_retain_tokens(asked, batch_size=self.config.dataset_size, seq_len=self.config.seq_len)
                for side, tokens_BT in zip(("forget", "retain"), found, strict=True):
                    if not len(tokens_BT):  # SAEBench would divide by no tokens, and take any latent
                        raise StageFailed(f"the text to {side} has fewer than {self.config.seq_len} tokens", where=side, fix="more text, or a smaller seq_len")
                for name in self.config.dataset_names:
                    save_target_question_ids(asked, 2 * self.config.llm_batch_size, str(kept), name)
                    if self._known(kept, name):
                        get_baseline_metrics(asked, 2 * self.config.llm_batch_size, str(kept), name, {"target_metric": "correct", "verbose": False})
        (shared / "artifacts").symlink_to(kept)

    @staticmethod
    def _known(artifacts: Path, name: str) -> int:
        """Questions of a set that the model answers rightly in every order."""
        kind = name if name == TARGET else f"mmlu-{name.replace('_', '-')}"
        return len((artifacts / "data" / "question_ids" / "all" / f"{kind}_correct.csv").read_text().split())

    # One SAE

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """The sweep over thresholds, numbers of latents and multipliers, and the best of it."""
        from sae_bench.evals.unlearning import eval_output as out
        from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
        from sae_bench.evals.unlearning.main import get_metrics_df, get_unlearning_scores
        from sae_bench.evals.unlearning.utils.eval import run_eval_single_sae

        key = (TARGET, self._identity())
        unknown = [name for name in self.config.dataset_names if not self._known(shared / "artifacts", name)]
        if unknown:
            told = f"the model knows nothing that could be unlearnt or kept: it answers no question of {', '.join(unknown)} rightly in all 24 orders of the choices"
            return {key: Scores(dict.fromkeys(self.metrics()), dict.fromkeys(self.metrics(), told))}
        left_out = ("seeds", "data_dir", "forget", "retain", "questions", "question_ids")
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.config).items() if name not in left_out}
        config = UnlearningEvalConfig(**settings, model_name=sae.cfg.model_name, llm_dtype=str(sae.dtype).removeprefix("torch."), random_seed=seed)
        shutil.copytree(shared / "artifacts" / "data", Path("artifacts") / "data")
        try:
            with self._texts():
                run_eval_single_sae(Asked(model), sae, config, "artifacts", "sae", force_rerun=False)
        finally:
            model.reset_hooks()
        table = get_metrics_df(str(Path("artifacts") / "sae" / "results" / "metrics"))
        values = {"unlearning_score": float(get_unlearning_scores(table))}
        values["unlearning_settings_kept"] = float((table["all_side_effects_mcq"] >= 0.99).mean())
        result = out.UnlearningEvalOutput(
            eval_config=config,
            eval_result_metrics=out.UnlearningMetricCategories(unlearning=out.UnlearningMetrics(unlearning_score=values["unlearning_score"])),
            eval_result_details=[],
            **provenance(sae),
        )
        return {key: Scores(values, output=plain(result))}

    def _identity(self) -> str:
        files = [self._forget, *(Path(path).expanduser() for path in (self.config.retain, *self.config.questions.values()) if path)]
        ids = sorted(Path(self.config.question_ids).expanduser().rglob("*.csv")) if self.config.question_ids else []
        repos = self.config.repositories()
        return hash_json([*map(sha256_file, [*files, *ids]), hubdata.identity(repos, self.config.data_dir) if repos else None])

    @contextlib.contextmanager
    def _texts(self) -> Iterator[None]:
        """Texts, questions and prompts where SAEBench looks for them: a link in the working folder, and its loader of datasets."""
        import datasets
        from sae_bench.evals.unlearning.utils import feature_activation, metrics

        loaded: dict[tuple, Any] = {}

        def load(path: str, name: str, split: str) -> Any:
            if (path, name) not in loaded:
                if path == "wikitext" and self.config.retain:
                    loaded[path, name] = [{"text": text} for text in texts(Path(self.config.retain))]
                elif path != "wikitext" and name in self._own:
                    loaded[path, name] = self._own[name]
                else:
                    loaded[path, name] = datasets.load_dataset(path, name, split=split)
            return loaded[path, name]

        CORPUS.parent.mkdir(parents=True, exist_ok=True)
        if not CORPUS.is_symlink():
            CORPUS.symlink_to(self._forget)
        with (
            hubdata.found_here(self.config.repositories(), self.config.data_dir, self.name),
            replaced(metrics, load_dataset=load, GEMMA_INST_FORMAT=self._prompt),
            replaced(feature_activation, load_dataset=load),
        ):
            yield


class Asked:
    """A TransformerBridge as SAEBench asks it questions: it passes for a HookedTransformer named as the model whose prompts SAEBench knows, and
    no prompt is cut (SAEBench reads the answer where the whole prompt ends)."""

    def __init__(self, model: Any):
        self._model = model
        self.cfg = copy.copy(model.cfg)
        self.cfg.model_name = GEMMA

    @property
    def __class__(self) -> type:
        """Another path is taken for what is not one: its answer tokens are those of one tokenizer."""
        from transformer_lens import HookedTransformer

        return HookedTransformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def to_tokens(self, text: str | list[str], **options: Any) -> Any:
        """int64 [B, T]; StageFailed where a prompt is longer than the model's context."""
        tokens_BT = self._model.to_tokens(text, truncate=False, **options)
        if tokens_BT.shape[1] > self.cfg.n_ctx:
            raise StageFailed(f"a question has {tokens_BT.shape[1]:,} tokens, and the model reads {self.cfg.n_ctx:,}", where="questions", fix="shorter questions")
        return tokens_BT


def _gemma() -> str:
    from sae_bench.evals.unlearning.utils.var import GEMMA_INST_FORMAT

    return GEMMA_INST_FORMAT


def prompt_format(words: Any, name: str) -> str:
    """The user's turn of the tokenizer's chat template with `{prompt}` in it; StageFailed where SAEBench cannot ask its questions."""
    what = f"saebench/unlearning cannot ask {name} its questions"
    if not words.chat_template:
        raise StageFailed(what, why="its tokenizer has no chat template, and only instruct models know when to answer", fix="an instruct model, such as google/gemma-2-2b-it")
    text = words.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True)
    if not words.bos_token or text.count(words.bos_token) != 1 or words.eos_token is None:
        raise StageFailed(what, why=f"SAEBench counts one BOS in each prompt and joins texts by EOS; here BOS is {words.bos_token!r}, EOS {words.eos_token!r}, and the template {text!r}")
    odd = [answer for answer in ANSWERS if len(words.encode(answer, add_special_tokens=False)) != 1]
    if odd:
        raise StageFailed(what, why=f"SAEBench compares single tokens, and {', '.join(map(repr, odd))} has several in this tokenizer")
    return text.replace("{", "{{").replace("}", "}}").replace(MARK, "{prompt}")


def _lines(file: Path, what: str, example: str) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line of a JSONL file."""
    file = file.expanduser()
    if not file.is_file():
        raise UsageError(f"{file} does not exist", where=what, fix=f"lines of {example}")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield f"{file}:{number}", dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{file}:{number} is no JSON object", where=what, why=str(error), fix=example) from error


def texts(file: Path) -> list[str]:
    """Texts of a file of {"text": …}."""
    example = '{"text": "…"}'
    found = []
    for place, row in _lines(file, "forget, retain", example):
        if not isinstance(row.get("text"), str):
            raise UsageError(f"{place} holds no text", fix=example)
        found.append(row["text"])
    return found


def questions(file: Path) -> list[dict[str, Any]]:
    """Multiple-choice questions of a file, as `cais/wmdp` and `cais/mmlu` have them."""
    example = '{"question": "…", "choices": ["…", "…", "…", "…"], "answer": 0}'
    found = []
    for place, row in _lines(file, "questions", example):
        choices: Iterable = row.get("choices") or ()
        whole = isinstance(row.get("question"), str) and isinstance(choices, list) and len(choices) == 4 and all(isinstance(choice, str) for choice in choices)
        if not whole or row.get("answer") not in (0, 1, 2, 3):
            raise UsageError(f"{place} is no question with four choices and an answer from 0 to 3", where="questions", fix=example)
        found.append(row)
    return found
