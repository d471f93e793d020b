"""Sizes and a seed in; rows with known features, and tiny language models on disk with a byte tokenizer, out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saehub.errors import UsageError
from saehub.seeds import derive, generator

if TYPE_CHECKING:
    from torch import Tensor

Family = Literal["llama", "gpt2", "gpt_neox"]
VOCAB = 258
"""256 bytes, `<s>` (256) and `</s>` (257)."""


def planted(n: int, d: int, n_features: int, l0: float, seed: int = 0, noise: float = 0.0, features: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows that are sparse sums of known features: the answer that a trainer must find.

        x = Σ_i a_i D_i + noise·ε     a_i ~ U[0.5, 1.5] with probability l0 / n_features, else 0;  ‖D_i‖ = 1

    Returns x_ND float32 [n, d] and the dictionary D_FD float32 [n_features, d]. `l0` is the mean number of active features a row;
    `features` (None: `seed`) draws another dictionary for the same a, which is what a transcoder predicts.
    """
    import torch

    if not 0 < l0 <= n_features:
        raise UsageError(f"l0 is {l0} with {n_features} features", fix="0 < l0 <= n_features")
    draw = generator("planted features", d, n_features, seed if features is None else features)
    D_FD = torch.nn.functional.normalize(torch.randn(n_features, d, generator=draw), dim=1)
    rows = generator("planted rows", n, d, n_features, float(l0), seed)
    active_NF = torch.rand(n, n_features, generator=rows) < l0 / n_features
    a_NF = active_NF * (0.5 + torch.rand(n, n_features, generator=rows))
    x_ND = a_NF @ D_FD
    return (x_ND + noise * torch.randn(n, d, generator=rows) if noise else x_ND), D_FD


def mmcs(dictionary_FD: Tensor, learned_GD: Tensor) -> float:
    """Mean over true features of the largest cosine with a learned one (Sharkey et al. 2022): 1 when every feature was found."""
    import torch

    unit = torch.nn.functional.normalize
    return float((unit(dictionary_FD.double(), dim=1) @ unit(learned_GD.double(), dim=1).T).max(dim=1).values.mean())


def tiny_text(documents: int = 64, seed: int = 0, words: int = 60) -> list[str]:
    """Sentences with a little structure (subject, verb, object), so that a model's rows are not all alike."""
    import random

    draw = random.Random(derive("tiny text", seed))
    subjects, verbs = ["the cat", "a model", "the old ship", "one feature", "my friend"], ["sees", "learns", "moves", "finds"]
    objects = ["a latent", "the sea", "42 rows", "no reason", "the left door"]
    return [
        " ".join(f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}." for _ in range(max(1, words // 6)))
        for _ in range(documents)
    ]


def tiny_model(path: str | Path, family: Family = "llama", *, layers: int = 2, d_model: int = 32, seed: int = 0) -> Path:
    """Write a random language model with a byte-level tokenizer to the folder `path` (under 2 seconds, about 100 kB) and return it.

    Loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`; context 64, vocabulary `VOCAB`. Weights are drawn
    from `seed` and are large enough that predictions depend on the input; the global random state is untouched.
    """
    import torch
    import transformers

    from saehub.data.model import no_bars

    path = Path(path)
    shape = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257}
    heads = max(1, d_model // 16)
    match family:
        case "llama":
            config = transformers.LlamaConfig(
                hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=heads, max_position_embeddings=64, tie_word_embeddings=False, **shape,
            )  # fmt: skip
        case "gpt2":
            config = transformers.GPT2Config(n_embd=d_model, n_layer=layers, n_head=heads, n_positions=64, **shape)
        case "gpt_neox":
            config = transformers.GPTNeoXConfig(
                hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=layers, num_attention_heads=heads,
                max_position_embeddings=64, **shape,
            )  # fmt: skip
        case _:
            raise UsageError(f"no tiny model of the family {family!r}", fix="llama, gpt2 or gpt_neox")
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draw = generator("tiny model", family, layers, d_model, seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:  # norms keep their ones, biases their zeros
                scale = 1.0 if "emb" in name or "wte" in name else 1.5 / weight.shape[-1] ** 0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=draw))
    with no_bars():
        model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer():
    """A `PreTrainedTokenizerFast` whose tokens are the 256 bytes, with `<s>` and `</s>`: it can encode anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
