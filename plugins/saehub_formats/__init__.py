"""Published checkpoint layouts as a saehub plugin: what can be read (and partly written), as data; imports no torch and needs no library.

No package computes with these layouts that could be installed and pinned, so every exporter's `run` is the published equation in float64,
written apart from its `read`: certificates say "verified against the published equation".
"""

from __future__ import annotations

from saehub import Component, hookimpl

_SUMMARIES = {
    "gemma_scope": ("GemmaScope", "Gemma Scope (params.npz): JumpReLU SAEs and transcoders; read and write"),
    "gemma_scope_2": ("GemmaScope2", "Gemma Scope 2 (params.safetensors): JumpReLU SAEs and (skip) transcoders; read"),
    "llama_scope": ("LlamaScope", "Llama Scope, Llamascopium (hyperparams.json or config.json): dataset norms folded; read"),
    "openai": ("OpenAI", "openai/sparse_autoencoder (.pt): ReLU, and TopK with layer norm; read"),
    "goodfire": ("Goodfire", "Goodfire (.pt, .pth): ReLU; read"),
    "qwen_scope": ("QwenScope", "Qwen-Scope (layer*.sae.pt): TopK, k from the model card or the repository's name; read"),
    "circuit_tracer": (
        "CircuitTracer",
        "circuit-tracer transcoder sets (config.yaml, layer_*.safetensors): ReLU and JumpReLU; read and write",
    ),
}


@hookimpl
def saehub_exporters() -> list[Component]:
    """One exporter a layout, each in the module of its name."""
    return [Component(name=name, target=f"saehub_formats.{name}:{cls}", summary=summary) for name, (cls, summary) in _SUMMARIES.items()]
