"""SAEs of a residual stream, a Hugging Face model and prompt files in; RAVEL's cause, isolation and disentanglement out."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saehub.api import EvalContext, ModelShape
from saehub.errors import StageFailed
from saehub.jsonio import hash_json, sha256_file
from saehub_saebench import hubdata
from saehub_saebench.config import RAVEL_PROMPTS, RavelConfig
from saehub_saebench.definitions import BY_EVALUATOR
from saehub_saebench.evaluator import BenchEvaluator, Key
from saehub_saebench.output import plain, provenance
from saehub_saebench.rows import Scores
from saehub_saebench.sae import BenchSAE

FILES = ("entity_attributes", "attribute_to_prompts", "prompt_to_split", "entity_to_split")
LAYERS = {"llama": ("model", "Gemma2ForCausalLM"), "gemma2": ("model", "Gemma2ForCausalLM"), "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM")}
"""Family -> the module that holds `layers`, and an architecture of SAEBench's table that finds them there."""


class Ravel(BenchEvaluator):
    """`saebench/ravel`. SAEBench expects decoder layers to return tuples, which they no longer do under transformers 5: the layers of a twin
    of the model, on the same weights, are wrapped for it."""

    name = "ravel"

    def __init__(self, config: RavelConfig | None = None):
        super().__init__(config or RavelConfig())

    def metrics(self) -> list[str]:
        """All three."""
        return list(BY_EVALUATOR[self.name])

    def check(self, context: EvalContext) -> None:
        """A family whose layers SAEBench finds, a tokenizer that begins with BOS, and prompt files."""
        shape, words = context.model.shape, context.model.tokenizer
        if shape.family not in LAYERS:
            raise StageFailed(f"saebench/ravel does not find the layers of a {shape.family} model", why=f"known: {', '.join(LAYERS)}")
        if not words.encode("a") or words.encode("a")[0] != words.bos_token_id:
            raise StageFailed(
                "saebench/ravel would read the token after the entity",
                why="it counts the BOS token to find the entity's last one, and this tokenizer adds none",
                fix="a model whose tokenizer begins with BOS (Llama, Gemma)",
            )
        absent = [path.name for path in self._files() if not path.is_file()]
        if absent and (self.config.data_dir or hubdata.offline()):
            raise StageFailed(
                f"saebench/ravel needs {', '.join(absent)}", where="data_dir", fix=hubdata.commands([RAVEL_PROMPTS], self.config.data_dir, self.config.parts())
            )

    def _folder(self) -> Path:
        return Path(self.config.data_dir or "").expanduser().absolute() / RAVEL_PROMPTS

    def _files(self) -> list[Path]:
        return [self._folder() / f"ravel_{entity}_{name}.json" for entity in self.config.entity_attribute_selection for name in FILES]

    def prepare(self, context: EvalContext, model: Any, saes: list[BenchSAE], seed: int, shared: Path) -> None:
        """The prompt files where SAEBench looks for them; its own filtered prompts are kept there too, for all SAEs of the seed."""
        if self.config.data_dir:
            (shared / "ravel" / "base").mkdir(parents=True)
            for path in self._files():
                shutil.copy(path, shared / "ravel" / "base" / path.name)
        else:
            (shared / "ravel").mkdir()
        torch.manual_seed(seed)

    def score(self, sae: BenchSAE, model: Any, seed: int, shared: Path, context: EvalContext) -> dict[Key, Scores]:
        """One SAE on every entity type."""
        from sae_bench.evals.ravel import eval_output as out
        from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
        from sae_bench.evals.ravel.main import run_eval_single_sae

        from saehub.data.model import model_dir_or_id

        where = str(model_dir_or_id(context.model.spec))  # its tokenizer is loaded by name
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("seeds", "data_dir")}
        settings["entity_attribute_selection"] = {entity: list(names) for entity, names in self.config.entity_attribute_selection.items()}
        config = RAVELEvalConfig(**settings, model_name=where, llm_dtype=str(sae.dtype).removeprefix("torch."), random_seed=seed, artifact_dir="ravel")
        shutil.copytree(shared / "ravel", "ravel", dirs_exist_ok=True)
        twin = with_tuples(context.model.hf, context.model.shape)
        found, by_class = run_eval_single_sae(config, sae, twin, context.device, "artifacts")
        for path in Path("ravel").glob("*.json"):  # SAEBench's completions of the prompts: the model's alone
            shutil.copy(path, shared / "ravel" / path.name)
        values = {"disentanglement_score": found["disentangle_score"], "cause_score": found["cause_score"], "isolation_score": found["isolation_score"]}
        result = out.RAVELEvalOutput(
            eval_config=config,
            eval_result_metrics=out.RAVELMetricCategories(ravel=out.RAVELMetricResults(**values)),
            eval_result_details=[],
            eval_result_unstructured=by_class,
            **provenance(sae),
        )
        digest = hash_json([sha256_file(path) for path in self._files()]) if self.config.data_dir else "hub"
        return {(RAVEL_PROMPTS, digest): Scores(values, output=plain(result))}


class TupleOut(nn.Module):
    """A decoder layer that returns a tuple: what SAEBench hooks."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        """The layer's output, as `(hidden states,)`."""
        out = self.layer(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)


class TensorOut(nn.Module):
    """The same, returning the tensor: what transformers calls."""

    def __init__(self, inner: TupleOut):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner").layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hidden states."""
        return self.inner(*args, **kwargs)[0]


class Layers(nn.ModuleList):
    """Asked for one by number, it gives the tuple's; gone through, the tensor's."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found.inner if isinstance(index, int) else found

    def __iter__(self) -> Any:
        return iter(self._modules.values())


def with_tuples(hf: nn.Module, shape: ModelShape) -> nn.Module:
    """A twin of `hf` on the same parameters whose layers SAEBench can hook; `hf` stays as it is, logits are bit-equal."""
    shared = {id(tensor): tensor for group in (hf.parameters(), hf.buffers()) for tensor in group}
    twin = copy.deepcopy(hf, dict(shared))
    holder, architecture = LAYERS[shape.family]
    body = getattr(twin, holder)
    body.layers = Layers([TensorOut(TupleOut(layer)) for layer in body.layers])
    twin.config.architectures = [architecture]
    return twin
