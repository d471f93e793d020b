"""A Hugging Face model in bfloat16 on a CPU in; the same one, over the same parameters, with compiled loops for its slow small modules, out.

Norms, activation functions and rotary attention take a good third of a small model's forward pass where the products are in bfloat16. A module
is replaced only if it computes, on random inputs, what the loops compute. What a hook sees at any module is what it saw before, to rounding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saehub_native.kernels.team import Team

EXACT = 2.0**-8
"""Relative: of one rounding to bfloat16, and a little more."""
TINY = 1e-7
"""Absolute: of a number near 0, such as a GELU far below it."""
ROUNDED = 2.0**-6
"""Relative, Frobenius: of an attention that rounds several times, beside one that rounds once."""
GELU = 2 * math.sqrt(2 / math.pi)
ACTIVATIONS = {"SiLU": (1.0, 0.0), "GELU with tanh": (GELU, 0.044715 * GELU), "quick GELU": (1.702, 0.0)}
"""(linear, cubic) of `extract_loops.activate`."""
LONGEST = 4096
"""Positions beyond which torch's own attention is used: ours holds the keys and values of one head in float32."""
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Where torch keeps a module's hooks."""
MORE = ("past_key_values", "past_key_value", "is_causal", "position_bias")
"""Of an attention's arguments: with any of these set, the module's own code runs."""

Forward = Callable[..., Any]


def fused(model_hf: nn.Module) -> nn.Module | None:
    """Another module tree over the same parameters and hooks, or None: other devices and dtypes, no module that is known, no numba."""
    weights, settings = list(model_hf.parameters()), getattr(model_hf, "config", None)
    if (
        not weights
        or any(weight.device.type != "cpu" or weight.dtype != torch.bfloat16 for weight in weights)
        or any("forward" in vars(module) for module in model_hf.modules())  # replaced by somebody else already
        or getattr(settings, "output_hidden_states", False)
        or getattr(settings, "output_attentions", False)
        or find_spec("numba") is None
    ):
        return None
    try:
        import saehub_native.extract_loops as loops
    except ImportError:  # numba is there but does not work with this Python or numpy
        return None
    work = Work(loops)
    made: dict[nn.Module, nn.Module] = {}
    twin = _twin(model_hf, made)
    with torch.inference_mode():
        found = [(module, forward) for module in twin.modules() if (forward := _faster(module, work)) is not None]
    for module, forward in found:
        module.forward = forward
    for module, copy in made.items():
        vars(copy).update({name: vars(module)[name] for name in HOOKS})
    return twin if found else None


def _twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree alone, without hooks: none sees the random inputs. Parameters, buffers and everything else are shared."""
    if module not in made:
        made[module] = twin = module.__class__.__new__(module.__class__)
        vars(twin).update(vars(module))
        vars(twin).update({name: OrderedDict() for name in HOOKS})
        vars(twin)["_modules"] = {name: child if child is None else _twin(child, made) for name, child in module._modules.items()}
    return made[module]


def _faster(module: nn.Module, work: Work) -> Forward | None:
    kind = type(module).__name__
    if kind.endswith("RMSNorm"):
        return _norm(module, work)
    if "GELU" in kind or "SiLU" in kind:
        return _activation(module, work)
    if kind.endswith("Attention") and all(type(getattr(module, f"{name}_proj", None)) is nn.Linear for name in "qkvo"):
        return _attention(module, work)
    return None


class Work:
    """The loops on torch tensors, on as many threads as torch uses."""

    def __init__(self, loops: Any):
        self.loops, self.team = loops, Team()

    def run(self, loop: Any, n: int, *arguments: Any) -> None:
        """The loop over n things."""
        pieces = min(n, torch.get_num_threads())
        self.team.run(lambda i: loop(n * i // pieces, n * (i + 1) // pieces, *arguments), pieces)

    def activate(self, x: Tensor, linear: float, cubic: float) -> Tensor:
        """x σ(linear x + cubic x³), of any shape."""
        out = torch.empty_like(x)
        self.run(self.loops.activate, x.numel(), _bits(x.view(-1)), np.float32(linear), np.float32(cubic), _bits(out.view(-1)))
        return out

    def normalise(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight over the last dimension; the weight in float32."""
        out = torch.empty_like(x)
        x_BD, out_BD = (tensor.view(-1, x.shape[-1]) for tensor in (x, out))
        self.run(self.loops.normalise, len(x_BD), _bits(x_BD), weight_D.float().numpy(), np.float32(eps), _bits(out_BD))
        return out

    def attend(self, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, cos_RT: Tensor, sin_RT: Tensor, head: int, scale: float) -> Tensor:
        """softmax(scale · rot(q) rot(k)ᵀ) v of causal heads of width `head`, side by side; fewer of k and v than of q; R ≤ head / 2."""
        out = torch.empty_like(q_BTD)
        heads, groups = (tensor.shape[-1] // head for tensor in (q_BTD, k_BTD))
        given = (*map(_bits, (q_BTD, k_BTD, v_BTD)), cos_RT.numpy(), sin_RT.numpy(), heads, groups, np.float32(scale), True, _bits(out))
        self.run(self.loops.attend, len(q_BTD) * groups, *given)
        return out


def _bits(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy()


def _fits(x: Any) -> bool:
    """Whether the loops can read it, and nobody wants gradients through it."""
    if not isinstance(x, Tensor) or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return x.is_contiguous() and x.numel() > 0 and not x.requires_grad


def _near(found: Tensor, wanted: Tensor) -> bool:
    """Every number, to one rounding."""
    return found.shape == wanted.shape and bool(((found.double() - wanted.double()).abs() <= EXACT * wanted.double().abs() + TINY).all())


def _norm(module: nn.Module, work: Work) -> Forward | None:
    """x / √(mean x² + eps) · (offset + weight), offset 0 (Llama) or 1 (Gemma)."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    scales = (3.0, eps**0.5, 300.0)  # at the second, eps counts
    x_BD = torch.cat([scale * torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)) for scale in scales]).bfloat16()
    wanted_BD = type(module).forward(module, x_BD.float())  # its own formula, before it rounds
    for offset in (0.0, 1.0):
        if _near(work.normalise(x_BD, offset + weight.float(), eps), wanted_BD):

            def forward(hidden_states: Tensor) -> Tensor:
                if not _fits(hidden_states):
                    return type(module).forward(module, hidden_states)
                return work.normalise(hidden_states, offset + module.weight.float(), eps)

            return forward
    return None


def _activation(module: nn.Module, work: Work) -> Forward | None:
    """x σ(linear x + cubic x³)."""
    x_N = torch.linspace(-20, 20, 1001).bfloat16()
    wanted_N = type(module).forward(module, x_N.double())
    for linear, cubic in ACTIVATIONS.values():
        if _near(work.activate(x_N, linear, cubic), wanted_N):

            def forward(x: Tensor) -> Tensor:
                return work.activate(x, linear, cubic) if _fits(x) else type(module).forward(module, x)

            return forward
    return None


def _attention(module: nn.Module, work: Work) -> Forward | None:
    """Causal attention of heads that are rotated by halves, without masks, caches or anything between its four products."""
    scale, head = getattr(module, "scaling", None), getattr(module, "head_dim", None)
    named = {name for name, _ in module.named_children()}
    if named != {"q_proj", "k_proj", "v_proj", "o_proj"} or not isinstance(scale, float) or not isinstance(head, int):
        return None

    def forward(hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None, **others: Any) -> Any:
        table = None
        if attention_mask is None and _fits(hidden_states) and hidden_states.shape[-2] <= LONGEST and not any(map(others.get, MORE)):
            table = _table(position_embeddings, head)
        if table is None:
            given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **others}
            return type(module).forward(module, hidden_states, **given)
        z_BTD = work.attend(module.q_proj(hidden_states), module.k_proj(hidden_states), module.v_proj(hidden_states), *table, head, scale)
        return module.o_proj(z_BTD), None

    return forward if all(_agrees(module, forward, x_BTD, head) for x_BTD in _inputs(module, scale, head)) else None


def _table(position_embeddings: Any, head: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin, float32 [R, T], of rotations that are the same for all sequences and for both halves; None: not such."""
    if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
        return None
    cos_TR, sin_TR = (table[0] if isinstance(table, Tensor) and table.ndim == 3 and len(table) == 1 else None for table in position_embeddings)
    if cos_TR is None or sin_TR is None or cos_TR.shape[-1] > head or cos_TR.shape[-1] % 2:
        return None
    half = cos_TR.shape[-1] // 2
    if not all(torch.equal(table[:, :half], table[:, half:]) for table in (cos_TR, sin_TR)):
        return None
    return cos_TR[:, :half].t().float().contiguous(), sin_TR[:, :half].t().float().contiguous()


def _inputs(module: nn.Module, scale: float, head: int) -> Iterator[Tensor]:
    """Random ones, such that attention is even, and such that it is sharp: an even one would show nothing of rotations."""
    x_BTD = torch.randn(2, 24, module.q_proj.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    yield x_BTD
    q, k = (projected(x_BTD).float().unflatten(-1, (-1, head)).square().sum(-1).mean().sqrt() for projected in (module.q_proj, module.k_proj))
    spread = float(scale * q * k) / math.sqrt(head)  # of the scores
    if math.isfinite(spread) and spread > 0:
        yield (x_BTD * math.sqrt(2 / spread)).bfloat16()


def _agrees(module: nn.Module, forward: Forward, x_BTD: Tensor, head: int) -> bool:
    angle_TR = torch.arange(x_BTD.shape[1])[:, None] * 100.0 ** -torch.linspace(0, 1, head // 2)
    given = {"position_embeddings": tuple(torch.cat([f(angle_TR)] * 2, -1)[None].bfloat16() for f in (torch.cos, torch.sin))}
    try:
        wanted = type(module).forward(module, x_BTD, attention_mask=None, **given)
    except Exception:  # a stranger's module, called as Llama's are: it may refuse in any way, and then it stays as it is
        return False
    if not isinstance(wanted, tuple) or len(wanted) != 2 or wanted[1] is not None:
        return False
    found_BTD = forward(x_BTD, attention_mask=None, **given)[0]
    return bool((wanted[0].float() - found_BTD.float()).norm() <= ROUNDED * wanted[0].float().norm())
