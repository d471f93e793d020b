"""Tiny random models of every family, built in memory."""

import pytest
import torch
import transformers

torch.set_num_threads(1)

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=97, max_position_embeddings=64)
ROTARY = dict(SIZES, num_key_value_heads=2, intermediate_size=48, head_dim=8)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "mistral": lambda: transformers.MistralConfig(**ROTARY),
    "qwen2": lambda: transformers.Qwen2Config(**{key: value for key, value in ROTARY.items() if key != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**dict(ROTARY, head_dim=16)),
    "gemma": lambda: transformers.GemmaConfig(**dict(ROTARY, head_dim=16)),
    "smollm3": lambda: transformers.SmolLM3Config(**{**ROTARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma2": lambda: transformers.Gemma2Config(**dict(ROTARY, head_dim=16), sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**dict(ROTARY, head_dim=16), sliding_window=16),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=False),
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, intermediate_size=48, pad_token_id=1),
}
MASKED = ("bert", "roberta")


def build(kind):
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if kind in MASKED else transformers.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[kind](), attn_implementation="eager" if kind == "gemma2" else "sdpa").eval()
    with torch.no_grad():  # norms start at 1 and biases at 0: move them, so that a tap on the wrong side of one shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)
    return model


@pytest.fixture(scope="session")
def models():
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = build(kind)
        return built[kind]

    return get


@pytest.fixture
def tokens_BT():
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(3))
