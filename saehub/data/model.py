"""A model's name in; where it lies, its sizes, a fingerprint of its contents (all without torch), or the loaded model with its tokenizer out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import ModelShape, ModelSpec
from saehub.errors import FormatError, StageFailed, UsageError
from saehub.jsonio import hash_json, read_json, sha256_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# config.json's `model_type` -> family of saehub.sites.FAMILIES.
_FAMILY_OF = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "smollm3"), "llama"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "gemma2"),
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "bert": "bert",
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta"),
}
# A field of ModelShape -> the keys of config.json that hold it, first found first used.
_KEYS = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "d_model": ("hidden_size", "n_embd", "d_model", "dim"),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
}
_CONTENT = (
    "config.json",
    "*.safetensors",
    "*.bin",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "chat_template*",
)
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "chat_template*")
_PLACES = "use builtin/tiny-llama, a local directory with config.json, or a Hugging Face id such as EleutherAI/pythia-70m"


def model_dir_or_id(spec: ModelSpec | str) -> Path | str:
    """The directory of an embedded or local model, or the Hugging Face id; UsageError for a path that is no model."""
    name = spec if isinstance(spec, str) else spec.name
    if name.startswith("builtin/"):
        from saehub import builtin

        try:
            folder = builtin.model_dir(name)
        except ValueError as error:
            raise UsageError(f"model {name!r} does not exist", why=str(error), fix=_PLACES) from None
        if not (folder / "config.json").is_file():
            raise UsageError(f"model {name!r} is not complete", why=f"{folder} holds no config.json", fix="install saehub again")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"model {name!r}: the directory holds no config.json", fix="save the model there with save_pretrained, or " + _PLACES
            )
        return path.resolve()
    if path.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"model {name!r}: no such directory", fix=_PLACES)
    return name


def local_files(name: str, revision: str | None = None) -> Path | None:
    """The directory that holds the model's files on this machine: the model's own, or its snapshot in the Hugging Face cache; None when there is none."""
    where = model_dir_or_id(name)
    if isinstance(where, Path):
        return where
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def has_chat_template(spec: ModelSpec) -> bool | None:
    """Whether the model's tokenizer can format conversations, by its files; None where they are not on this machine. Loads nothing."""
    folder = local_files(spec.name, spec.revision)
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    if any(folder.glob("chat_template*")) or any(folder.glob("additional_chat_templates/*")):
        return True
    return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))


def _not_here(name: str, revision: str | None, said: str | None = None) -> UsageError:
    at = f" (revision {revision})" if revision else ""
    return UsageError(
        f"model {name!r}{at} is not on this machine and could not be fetched from the Hugging Face hub",
        where="model.name",
        why="the hub is unreachable, switched off by HF_HUB_OFFLINE, or the model does not exist or is gated",
        fix=f"on a machine with the hub: `hf auth login` if it is gated, then `hf download {name}`; or give a local directory; "
        "or, to plan only, declare its sizes under model.shape",
        said=said,
    )


def read_config(name: str, revision: str | None, fetch: bool) -> dict | None:
    """The model's config.json, parsed; None when it is not on this machine and `fetch` is off."""
    folder = local_files(name, revision)
    if folder is None and fetch:
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        except Exception as error:  # the hub client has a dozen ways to say "no"
            raise _not_here(name, revision, str(error)) from error
    return None if folder is None else read_json(folder / "config.json")


def read_shape(name: str, revision: str | None = None, declared: ModelShape | None = None) -> ModelShape:
    """The model's sizes from its config.json (embedded, local, in the hub's cache, else fetched when nothing is declared), or as declared.

    Raises UsageError when neither is there, and when both are there and disagree.
    """
    config = read_config(name, revision, fetch=declared is None)
    if config is None:
        return declared
    shape = shape_of(config, name)
    if declared is not None:
        differ = [
            f"{f.name}: {getattr(declared, f.name)} declared, {getattr(shape, f.name)} in config.json"
            for f in fields(ModelShape)
            if getattr(declared, f.name) != getattr(shape, f.name) and f.name != "family"
        ]
        if differ:
            raise UsageError(
                f"model.shape is not the shape of {name!r}",
                where="model.shape",
                why="; ".join(differ),
                fix="correct it, or leave model.shape out",
            )
    return shape


def shape_of(config: dict, name: str = "the model") -> ModelShape:
    """A config.json, parsed, as a ModelShape; what it leaves to its class's defaults is asked of transformers."""
    text = _text_config(config)
    found = {part: next((text[key] for key in keys if text.get(key) is not None), None) for part, keys in _KEYS.items()}
    if found["d_mlp"] is None and text.get("model_type") == "gpt2" and found["d_model"]:
        found["d_mlp"] = 4 * found["d_model"]
    sparse = any(value is None for value in found.values()) or (
        text.get("head_dim") is None and text.get("model_type") in ("gemma", "gemma2", "gemma3_text", "qwen3")
    )
    if sparse and not config.get("_filled"):
        return shape_of(_with_defaults(config, name), name)
    missing = [part for part, value in found.items() if value is None and part not in ("d_mlp", "context")]
    if missing:
        raise UsageError(
            f"the sizes of {name!r} cannot be read from its config.json",
            why=f"it states no {', '.join(missing)}",
            fix="declare them under model.shape",
        )
    kind = text.get("model_type", "")
    family = _FAMILY_OF.get(kind, "other")
    if family == "gpt_neox" and not text.get("use_parallel_residual", True):
        family = "gpt_neox_sequential"
    if family == "roberta" and found["context"]:
        found["context"] -= 2  # its positions start after the padding index
    d_head = text.get("head_dim") or found["d_model"] // found["n_heads"]
    found["d_mlp"] = found["d_mlp"] or 0
    found["context"] = found["context"] or 1 << 30
    return ModelShape(family=family, d_head=d_head, **found)


def _text_config(config: dict) -> dict:
    """The language model's part of a multimodal config."""
    text = config.get("text_config")
    return {"model_type": config.get("model_type"), **text} if isinstance(text, dict) else config


def _with_defaults(config: dict, name: str) -> dict:
    from transformers import AutoConfig

    try:
        kind = config["model_type"]
        full = AutoConfig.for_model(**{key: value for key, value in config.items()}).to_dict()
    except Exception as error:
        raise UsageError(
            f"the sizes of {name!r} cannot be read from its config.json", said=str(error), fix="declare them under model.shape"
        ) from error
    return {**full, "model_type": kind, "_filled": True}


@lru_cache(maxsize=512)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    return sha256_file(path)


def _hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return hash_json({path.name: _file_hash(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files})


def fingerprint(spec: ModelSpec) -> str:
    """What the model is: `sha256:…` over a local model's files, `hub:id@commit` from the cache, `hub:id@?revision` while nothing is on this machine."""
    where = model_dir_or_id(spec)
    if isinstance(where, Path):
        return "sha256:" + _hash_files(where, _CONTENT)
    snapshot = local_files(where, spec.revision)
    return f"hub:{where}@{snapshot.name}" if snapshot else f"hub:{where}@?{spec.revision or 'main'}"


def tokenizer_hash(spec: ModelSpec) -> str:
    """SHA-256 over the tokenizer's files (names and bytes), wherever the model came from."""
    folder = local_files(spec.name, spec.revision)
    if folder is None:
        raise _not_here(spec.name, spec.revision)
    return _hash_files(folder, _TOKENIZER)


def resolve_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu; a device that this machine lacks is a UsageError."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    kind = device.partition(":")[0]
    if not has.get(kind, False) or (kind == "cuda" and ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count()):
        raise UsageError(
            f"device {device!r} does not exist on this machine",
            where="model.device",
            fix=f"use auto, {', '.join(k for k in has if has[k])}",
        )
    return device


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers without its progress bars: stderr is ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as torch's object."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise UsageError(f"dtype {name!r} is not known", fix="use " + ", ".join(kinds))
    return kinds[name]


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer; UsageError when the hub is out of reach, FormatError when its files are broken or absent."""
    from transformers import AutoTokenizer

    where = model_dir_or_id(spec)
    try:
        return AutoTokenizer.from_pretrained(where, revision=spec.revision)
    except Exception as error:
        if isinstance(where, str) and local_files(where, spec.revision) is None:
            raise _not_here(where, spec.revision, str(error)) from error
        raise FormatError(
            f"the tokenizer of {spec.name!r} cannot be loaded",
            where=str(where),
            said=str(error),
            fix="put its tokenizer.json beside config.json",
        ) from error


@dataclass
class ModelHandle:
    """A loaded language model in evaluation mode, unprocessed weights, and everything that says which one it is."""

    hf: PreTrainedModel
    """The causal (or masked) language model."""
    tokenizer: PreTrainedTokenizerBase | None
    device: str
    shape: ModelShape
    spec: ModelSpec
    fingerprint: str
    _views: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, spec: ModelSpec, *, tokenizer: bool = True) -> ModelHandle:
        """Load from an embedded or local directory, or the hub. UsageError: not there; StageFailed: there, but transformers cannot load it."""
        import transformers

        where = model_dir_or_id(spec)
        device = resolve_device(spec.device)
        config = read_config(spec.name, spec.revision, fetch=True)
        kind = auto_class(config)
        modern = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 56)
        settings = {
            "dtype" if modern else "torch_dtype": torch_dtype(spec.dtype),
            "attn_implementation": spec.attention,
            "revision": spec.revision,
        }
        try:
            with no_bars():
                hf = getattr(transformers, kind).from_pretrained(where, **settings)
        except Exception as error:
            offline = isinstance(where, str) and not any(
                file for kind in ("safetensors", "bin") for file in local_files(where, spec.revision).glob(f"*.{kind}")
            )
            if offline and isinstance(error, OSError):
                raise _not_here(spec.name, spec.revision, str(error)) from error
            raise StageFailed(
                f"model {spec.name!r} cannot be loaded",
                where=str(where),
                said=f"{type(error).__name__}: {error}",
                fix="set model.attention to eager"
                if "attention implementation" in str(error)
                else "check that the directory is whole, and model.dtype and model.attention",
            ) from error
        hf = hf.to(device).eval().requires_grad_(False)
        words = load_tokenizer(spec) if tokenizer else None
        return cls(hf, words, device, shape_of(config, spec.name), spec, fingerprint(spec))

    def view(self, address: str) -> Any:
        """The model as another library's object over the same parameters: what `view(handle)` of the extractor `address` makes of it, made once.

        UsageError: no such extractor, or one that has no view.
        """
        if address not in self._views:
            from saehub.plugins import catalog

            extractor = catalog().find("extractor", address).load()
            if not hasattr(extractor, "view"):
                raise UsageError(f"{address} reads the model as it is and has no object of its own around it", fix="use the handle's `hf`")
            self._views[address] = extractor.view(self)
        return self._views[address]

    def bridge(self) -> Any:
        """A TransformerLens TransformerBridge over the same parameters (unprocessed, not copied); `hf` itself stays as it is."""
        return self.view("transformer_lens/bridge")


def auto_class(config: dict) -> str:
    """The auto class that gives a model with its language-modelling head where it has one."""
    built = (config.get("architectures") or [""])[0]
    if built.endswith(("ForMaskedLM", "ForPreTraining")):
        return "AutoModelForMaskedLM"
    if built.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "AutoModelForCausalLM"
    return "AutoModel"
