"""The Triton kernels in; the error of each against plain torch or float64, beside what it may be, out: the correctness part of gpu.py.

On a processor (TRITON_INTERPRET=1) at tiny sizes, on a CUDA device at larger ones. A check that raises is a failed check, and the next ones run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Check = tuple[str, float, float]
"""What was measured, the error, the bound."""
EVERY = "every selected latent's float64 value within 8u·scale of the k-th"


def rows_of(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    """Sparse sums of 4,096 directions with a mean and some noise, float32, mean norm √d."""
    draw = torch.Generator(device=device).manual_seed(seed)
    D_FD = torch.nn.functional.normalize(torch.randn(4096, d, generator=draw, device=device), dim=1)
    chance_F = torch.arange(1, 4097, device=device, dtype=torch.float32) ** -0.7
    indices = torch.multinomial(chance_F, n * 24, replacement=True, generator=draw).view(n, 24)
    x_ND = torch.nn.functional.embedding_bag(
        indices, D_FD, per_sample_weights=0.5 + 2 * torch.rand(n, 24, generator=draw, device=device), mode="sum"
    )
    x_ND += 0.2 + 0.3 * (24 / d) ** 0.5 * torch.randn(n, d, generator=draw, device=device)
    return x_ND * (d**0.5 / x_ND.norm(dim=1).mean())


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def all_checks(device: str, only: list[str] | None = None) -> Iterator[Check]:
    """Every check, or those of some groups."""
    for group in (selection, batch_selection, rows, updates, dead_latents, training):
        if only and group.__name__ not in only:
            continue
        try:
            yield from group(device)
        except Exception as error:  # the others are worth knowing
            yield (
                f"{group.__name__.replace('_', ' ')}: raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
                float("inf"),
                0.0,
            )


def setting(device: str) -> SimpleNamespace:
    """Rows, weights, and the two sets of kernels."""
    from saehub_native.kernels.gpu import GpuKernels
    from saehub_native.kernels.reference import ReferenceKernels

    small = device == "cpu"
    n, d, F, k = (6, 16, 528, 3) if small else (512, 520, 20_000, 32)
    draw = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(n, d, generator=draw).to(device), (torch.randn(F, d, generator=draw) / d**0.5).to(device)
    b_F = (0.1 * torch.randn(F, generator=draw)).to(device)

    def gpu(kind: str | None = None, precision: str = "ieee") -> GpuKernels:
        kernels = GpuKernels(kind)
        kernels.precision = precision
        kernels.r = 8 if small else kernels.r
        return kernels

    return SimpleNamespace(small=small, n=n, d=d, F=F, k=k, draw=draw, x=x_BD, W=W_FD, b=b_F, gpu=gpu, plain=ReferenceKernels())


def selection(device: str) -> Iterator[Check]:
    """K0 to K3: ranking, threshold, candidates, exact values; then the whole selection, by every kind of ranking product."""
    from saehub_native.kernels.audit import missed_rows
    from saehub_native.kernels.gpu import KINDS
    from saehub_native.kernels.gpu_common import GROUP

    s = setting(device)
    gpu, k, x_BD, W_FD, b_F = s.gpu(), s.k, s.x, s.W, s.b
    for by_size in (False, True):
        word = "|p|" if by_size else "relu"
        scores_BF, maxima_BG = gpu.scores(x_BD, W_FD, b_F, by_size)
        values_BC, score_BC, indices_BC, counts_B, bar_B = gpu.candidates(x_BD, W_FD, b_F, k + gpu.r, scores_BF, maxima_BG)
        p_BF = x_BD.bfloat16().double() @ W_FD.bfloat16().double().T + b_F.double()
        s_BF = p_BF.abs() if by_size else p_BF.clamp_min(0)
        here_BC = torch.arange(indices_BC.shape[1], device=device) < counts_B[:, None]
        rounding = 2.0**-22 if gpu.interpreted else 2.0**-8  # scores are bfloat16 on a device
        yield f"encode, {word}: ranking scores", relative(score_BC[here_BC], s_BF.gather(1, indices_BC)[here_BC]), rounding
        bar = torch.nn.functional.pad(s_BF, (0, -s.F % GROUP)).unflatten(1, (-1, GROUP)).amax(2).topk(k + gpu.r, dim=1).values[:, -1]
        yield f"threshold, {word}: the (k + r)-th group maximum", relative(bar_B, bar), rounding
        lacking = (counts_B < k + gpu.r).sum() + sum(
            int((row[1:] <= row[:-1]).sum()) for row in (r[:c] for r, c in zip(indices_BC, counts_B, strict=True))
        )
        yield f"gather, {word}: rows with fewer than k + r candidates, or out of order", float(lacking), 0.0
        exact_BF = x_BD.double() @ W_FD.double().T + b_F.double()
        yield f"refine, {word}: exact values", relative(values_BC[here_BC], exact_BF.gather(1, indices_BC)[here_BC]), 1e-6
    for kind in KINDS:
        for rule in ("top", "abs") if kind != "float32" else ("top",):
            values_BK, indices_BK = s.gpu(kind).encode_select(x_BD, W_FD, b_F, k, rule)
            missed = missed_rows(x_BD, W_FD, b_F, values_BK, indices_BK, k, rule)
            yield f"select, {rule}, ranked by {kind}: rows where not {EVERY}", float(missed.sum()), 0.0
    tied_FD = W_FD.clone()
    tied_FD[1::2] = tied_FD[::2]  # every latent twice: where k is odd no candidate stands clear of the bar
    n = 3
    for rule in ("top", "abs"):
        found, expected = (kernels.encode_select(x_BD[:n], tied_FD, b_F * 0, k | 1, rule) for kernels in (gpu, s.plain))
        yield f"choose, ties, {rule}: values against float32", relative(found[0].sort().values, expected[0].sort().values), 1e-6
        yield f"choose, ties, {rule}: rows with a latent twice", float(sum(len(set(row)) != (k | 1) for row in found[1].tolist())), 0.0
    unsure_B = torch.tensor([True, False] * (len(x_BD) // 2), device=device)
    values_BK, indices_BK = torch.zeros(len(x_BD), k, device=device), torch.zeros(len(x_BD), k, device=device, dtype=torch.int64)
    gpu._settle(x_BD, W_FD, b_F, values_BK, indices_BK, unsure_B, scores_BF, k, False)
    expected = s.plain.encode_select(x_BD, W_FD, b_F, k)[0]
    yield "exact: rows settled in float32", relative(values_BK[unsure_B].sort().values, expected[unsure_B].sort().values), 1e-6
    yield "exact: rows left alone that were touched", float(values_BK[~unsure_B].abs().sum()), 0.0
    yield "select, no row positive: values", float(gpu.encode_select(x_BD[:n], W_FD, b_F - 100, k)[0].abs().sum()), 0.0


def batch_selection(device: str) -> Iterator[Check]:
    """The n-th largest of many by histograms, and BatchTopK's choice with it."""
    from saehub_native.kernels.audit import missed_rows

    s = setting(device)
    gpu, k = s.gpu(), s.k
    for name, values_N in (("uniform", torch.rand(3000, generator=s.draw)), ("half zeros", torch.randn(3000, generator=s.draw).relu())):
        ordered = values_N.sort(descending=True).values
        wrong = sum(float(gpu.nth_largest(values_N.to(device), n)) != float(ordered[n - 1]) for n in (1, 8, 1234, 3000))
        yield f"histogram, {name}: n-th largest that differ from sorting", float(wrong), 0.0
    x_BD = s.x * torch.linspace(0.2, 3, len(s.x), device=device)[:, None]  # rows that get very different shares
    first_guess = gpu._error
    for step in range(2):  # the second one starts from the first one's error
        values_BK, indices_BK = gpu.encode_select_batch(x_BD, s.W, s.b, k)
        expected, _ = s.plain.encode_select_batch(x_BD, s.W, s.b, k)
        yield f"batch, {step}: pairs more or fewer than plain torch", abs(float((values_BK > 0).sum() - (expected > 0).sum())), 0.0
        yield f"batch, {step}: values", relative(values_BK.flatten().sort().values[-k:], expected.flatten().sort().values[-k:]), 1e-6
        cut = float(expected[expected > 0].min())
        missed = missed_rows(x_BD, s.W, s.b, values_BK, indices_BK, k, "batch", cut)
        yield f"batch, {step}: rows where not every latent stands on its side of the cut, within 8u·scale", float(missed.sum()), 0.0
    yield "batch: left to plain torch", float(gpu._error == first_guess), 0.0
    nothing = gpu.encode_select_batch(x_BD, s.W, s.b - 100, k)[0]
    yield "batch, nothing positive: values", float(nothing.abs().sum()), 0.0


def rows(device: str) -> Iterator[Check]:
    """K4: reconstruction, loss and gradients of a row; K8: counters."""
    s = setting(device)
    gpu, plain = s.gpu(), s.plain
    y_BD = torch.randn(s.n, s.d, generator=s.draw).to(device)
    values_BK, indices_BK = plain.encode_select(s.x, s.W, s.b, s.k)
    values_BK[0] = 0
    wide_BK = torch.randint(s.F, (s.n, 40), generator=s.draw).to(device), torch.rand(s.n, 40, generator=s.draw).to(device)
    for name, (at_BK, v_BK) in {"": (indices_BK, values_BK), ", k 40": wide_BK}.items():
        results = [kernels.reconstruct(y_BD.clone(), v_BK, at_BK, s.W, 0.37) for kernels in (gpu, plain)]
        for what, found, expected in zip(("residual", "gradient", "value gradients", "squared error"), *results, strict=True):
            yield f"reconstruct{name}: {what}", relative(found, expected), 2e-6
    fired_F = torch.zeros(s.F, dtype=torch.bool, device=device)
    fired_F[indices_BK[values_BK != 0]] = True
    yield "group: latents that fired, or not, by mistake", float((gpu.fired(indices_BK, values_BK != 0, s.F) != fired_F).sum()), 0.0
    firing, ones = gpu.group(indices_BK, s.F, values_BK), torch.ones(s.n, 1, device=device)
    expected = torch.zeros(s.F, dtype=torch.float64, device=device).index_add_(0, indices_BK.flatten(), values_BK.flatten().double())
    yield "totals: sums of a latent's pairs", relative(gpu.latent_sums(firing, values_BK, ones).squeeze(1), expected), 1e-6


def updates(device: str) -> Iterator[Check]:
    """K6: the per-latent kernel in its three modes, with AuxK's dense rows and a projection, against dense float64; then with 8-bit moments."""
    from saehub_native.optim import Adam
    from saehub_native.optim8 import Adam8

    s = setting(device)
    gpu, F = s.gpu(), s.F
    n, d = (4, 272) if s.small else (len(s.x), s.d)  # more than one block of 8-bit moments
    if s.small:
        F = 64
    draw = torch.Generator().manual_seed(1)
    x_BD, indices_BK, values_BK = (
        torch.randn(n, d, generator=draw).to(device),
        torch.randint(F, (n, 3), generator=draw).to(device),
        torch.rand(n, 3, generator=draw).to(device),
    )
    W_FD = torch.nn.functional.normalize(torch.randn(F, d, generator=draw), dim=1).to(device)
    extra_N = torch.randperm(F, generator=draw)[: F // 8].to(device)
    extra_ND = torch.randn(len(extra_N), d, generator=draw).to(device)
    gpu.lazy = True
    sums = gpu.latent_sums(gpu.group(indices_BK, F, values_BK), values_BK, x_BD).index_add_(0, extra_N, extra_ND)
    gpu.lazy, sums.sphere = False, True
    pairs_FD = torch.zeros(F, d, dtype=torch.float64, device=device)
    for j in range(indices_BK.shape[1]):
        pairs_FD.index_add_(0, indices_BK[:, j], values_BK[:, j, None].double() * x_BD.double())
    pairs_FD[extra_N] += extra_ND.double()

    def dense(weight: Tensor) -> Tensor:
        g_FD = pairs_FD.to(weight)
        return g_FD - (g_FD * weight).sum(1, keepdim=True) * weight

    exact_FD = dense(W_FD.double())
    yield "latents: gradient", relative(sums.dense(W_FD), exact_FD), 1e-6
    square = float(exact_FD.square().sum())
    yield "latents: its square", abs(gpu.square(sums, W_FD) / square - 1), 1e-5
    yield "bound: below the square by", max(0.0, 1 - gpu.square_bound(sums) / square), 0.0
    plain_D = torch.randn(d, generator=draw).to(device)
    for largest in (1e6, 0.5):
        factor = gpu.clip_factor({"W": W_FD}, [plain_D], {"W": sums}, largest)
        expected = min(1.0, largest / (square + float(plain_D.double().square().sum())) ** 0.5)
        yield f"latents: factor of clipping at {largest:g}", abs(float(factor) / expected - 1), 1e-5
    sums.factor = 0.5
    adams = [Adam({"W": W_FD.clone()}), Adam({"W": W_FD.double().clone()})]
    gpu.low(adams[0].params["W"])
    for _ in range(3):
        adams[0].step({"W": sums}, 1e-2)
        weight = adams[1].params["W"]
        adams[1].step({"W": dense(weight) * 0.5}, 1e-2)
        weight.div_(weight.norm(dim=1, keepdim=True))
    # on a device, with many numbers, a gradient of almost 0 may have another sign, which Adam makes a step of
    yield "update: weight after 3 steps", relative(adams[0].params["W"], adams[1].params["W"]), 2e-6 if s.small else 2e-4
    yield "update: second moment", relative(adams[0].v["W"], adams[1].v["W"]), 1e-5
    yield "update: bfloat16 copy", relative(gpu.low(adams[0].params["W"]), adams[0].params["W"]), 2.0**-8
    triton, plain = Adam8({"W": W_FD.clone()}), Adam8({"W": W_FD.clone()})
    for _ in range(3):
        before = plain.params["W"].clone()
        triton.step({"W": sums}, 1e-2)
        plain.step({"W": dense(before) * 0.5}, 1e-2)
        plain.params["W"].div_(plain.params["W"].norm(dim=1, keepdim=True))
    for kind in ("m", "v"):
        # 0.2 %: a share within an ulp of a step of the rounding may fall on either side
        apart = (getattr(triton, kind)["W"] != getattr(plain, kind)["W"]).double().mean()
        yield f"update, 8 bits: codes of {kind} that differ from plain torch", float(apart), 2e-3
    yield "update, 8 bits: scales of v", relative(triton.block_scales["v"]["W"], plain.block_scales["v"]["W"]), 1e-5
    yield "update, 8 bits: weight", relative(triton.params["W"], plain.params["W"]), 1e-4 if s.small else 1e-3


def dead_latents(device: str) -> Iterator[Check]:
    """K7: AuxK's loss and gradients against the plain one, with none, few and many dead latents, in several chunks of rows."""
    import saehub_native.kernels.gpu_dead as module
    from saehub_native.architectures.auxk import add_auxk

    s = setting(device)
    n, d, F = (20, 24, 80) if s.small else (512, 520, 6000)
    k_aux, alpha, kept = (5 if s.small else 64), 1 / 32, (module.SCORE_BYTES, module.LEAST_ROWS, module.PROGRAMS)
    draw = torch.Generator().manual_seed(2)
    x_BD, e_BD = torch.randn(n, d, generator=draw).to(device), torch.randn(n, d, generator=draw).to(device)
    params = {
        "W_enc": torch.randn(F, d, generator=draw).to(device),
        "b_enc": torch.randn(F, generator=draw).to(device),
        "W_dec": torch.randn(F, d, generator=draw).to(device),
    }
    # several chunks of rows, the last one not full, and programs with several tiles each
    module.SCORE_BYTES, module.LEAST_ROWS, module.PROGRAMS = 1, 8 if s.small else 64, 2
    # On a device, a latent at the edge of the choice may change sides: in one row in twenty under TF32, which is 2⁻¹⁰ off.
    ways = {"ieee": 2e-6} if s.small else {"ieee": 2e-2, "tf32": 0.15}
    try:
        cases = [(precision, *case) for precision in ways for case in ((0, False), (3, False), (F // 2, False), (F // 2, True))]
        for precision, many, signed in cases:
            bound = ways[precision]
            dead_F = torch.zeros(F, dtype=torch.bool, device=device)
            dead_F[torch.randperm(F, generator=draw)[:many].to(device)] = True
            gpu = s.gpu(precision=precision)
            gpu.lazy = True
            none_BK, at_BK = torch.zeros(n, 1, device=device), torch.zeros(n, 1, dtype=torch.int64, device=device)
            firing = gpu.group(at_BK, F, none_BK)
            ours = {name: gpu.latent_sums(firing, none_BK, x_BD) for name in ("W_enc", "W_dec")} | {"b_enc": torch.zeros(F, device=device)}
            plain = {name: torch.zeros_like(p) for name, p in params.items()}
            arguments = dict(k_aux=k_aux, alpha=alpha, signed=signed)
            losses = [
                float(add_auxk(g, params, x_BD, e_BD, dead_F, kernels=kernels, **arguments))
                for g, kernels in ((ours, gpu), (plain, s.plain))
            ]
            word = f"auxk, {precision}, {many} dead{', signed' if signed else ''}"
            yield f"{word}: loss", abs(losses[0] - losses[1]) / max(1e-9, abs(losses[1])), bound
            for name in params:
                found = ours[name] if name == "b_enc" else ours[name].dense(params[name])
                if many:
                    yield f"{word}: {name}", relative(found, plain[name]), bound
                else:
                    yield f"{word}: {name}", float(found.abs().sum()), 0.0
    finally:
        module.SCORE_BYTES, module.LEAST_ROWS, module.PROGRAMS = kept


def session(
    kernels: str,
    device: str,
    d: int,
    n_latents: int,
    k: int,
    batch: int,
    steps: int,
    architecture: str = "topk",
    calibration: int = 4096,
    **settings: object,
):
    """A native training under those kernels."""
    from saehub.api import Job
    from saehub_native import config as configs
    from saehub_native.train import NativeTrainer

    before = os.environ.get("SAEHUB_KERNELS")
    os.environ["SAEHUB_KERNELS"] = kernels
    try:
        made = {"topk": configs.TopKConfig, "batchtopk": configs.BatchTopKConfig, "abstopk": configs.AbsTopKConfig}[architecture]
        config = made(k=k, width=n_latents, batch=batch, calibration=min(calibration, 8 * batch), **settings)
        job = Job("gpu", "resid_post.0", None, d, d, steps, batch, steps * batch, 0, device=device)
        return NativeTrainer(config).open(job, lambda n: (rows_of(n, d, device, seed=9), None))
    finally:
        os.environ.pop("SAEHUB_KERNELS")
        if before is not None:
            os.environ["SAEHUB_KERNELS"] = before


class NoWaiting(TorchDispatchMode):
    """Counts operations that read numbers back from a device, or whose result's shape depends on numbers: none can be recorded."""

    WAIT = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "bincount",
        "repeat_interleave",
        "is_nonzero",
        "equal",
        "lift_fresh",
        "_unique2",
        "kthvalue",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or (name.removesuffix("_") in self.WAIT or name in self.WAIT):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def addresses(session_) -> dict[str, int]:
    """Where everything lies that a recorded step touches and that outlives it."""
    kernels, replay = session_.kernels, session_.replay
    tensors = (
        dict(session_.params)
        | session_.optimizer.state()
        | {"since_fired": session_.since_fired_F, "rows": replay.x_BD, "numbers": replay.numbers_3}
    )
    if kernels._copy is not None:
        tensors["copy"] = kernels._copy[2]
    return {name: t.data_ptr() for name, t in (tensors | (kernels._held or {})).items()}


def training(device: str) -> Iterator[Check]:
    """Whole steps: against the plain kernels, the same bits twice, and through a saved state; nothing in one waits for the device or moves."""
    small = device == "cpu"
    d, F, k, batch, steps = (8, 128, 2, 4, 4) if small else (256, 16_384, 16, 1024, 16)
    x = [rows_of(batch, d, device, seed=step) for step in range(steps)]
    settings = {"dead_after": batch, "k_aux": 4}

    def begin(kernels: str, **more: object):
        session_ = session(kernels, device, d, F, k, batch, steps, **(settings | more))
        if kernels.startswith("gpu"):
            session_.kernels.r = 2 if small else session_.kernels.r
            session_.kernels.precision = "ieee"
        return session_

    def train(session_, start: int = 0, stop: int | None = None):
        for step in range(start, steps if stop is None else stop):
            session_.step(x[step])
        return session_

    def resumed(state: tuple, **more: object):
        session_ = begin("gpu", **more)
        session_.load_state({name: t.clone() for name, t in state[0].items()}, json.loads(json.dumps(state[1])))
        return train(session_, steps // 2)

    def differing(one, other) -> float:
        return float(sum((one.params[n] != other.params[n]).sum() for n in one.params))

    whole, plain = train(begin("gpu"), 0, steps // 2), train(begin("reference"))
    before, state, watch = addresses(whole), whole.state(), NoWaiting()
    if small:
        work = whole.replay.work

        def watched(*arguments):
            with watch:
                return work(*arguments)

        whole.replay.work = watched
    train(whole, steps // 2)
    if small:
        yield f"step: operations that wait for the device {watch.found[:4] or ''}", float(len(watch.found)), 0.0
    yield "step: tensors that moved", float(sum(before[name] != at for name, at in addresses(whole).items())), 0.0
    if not small:
        yield f"step: recorded as a CUDA graph ({whole.replay.reason or 'yes'})", float(whole.replay.graph is None), 0.0
        yield "step: played back too few times by", max(0.0, 8.0 - whole.replay.replayed), 0.0
    for name, weight in whole.params.items():
        # on a device, a gradient of almost 0 may have another sign, which Adam makes a step of
        yield f"training, {steps} steps: {name} against the plain kernels", relative(weight, plain.params[name]), 1e-4 if small else 2e-2
    if not small:
        again = begin("gpu")
        again.replay.reason = "op by op, to compare"
        yield "training: bits that differ op by op from the recording's", differing(whole, train(again)), 0.0
    yield "training: bits that differ after a resume", differing(whole, resumed(state)), 0.0
    eight, plain = train(begin("gpu", adam_bits=8), 0, steps // 2), train(begin("reference", adam_bits=8))
    state = eight.state()
    train(eight, steps // 2)
    for name in ("W_enc", "W_dec"):
        # a code that falls on the other side of a rounding step moves the weight by a part of lr
        yield f"training, 8 bits: {name} against plain torch", relative(eight.params[name], plain.params[name]), 2e-2
    yield "training, 8 bits: bits that differ after a resume", differing(eight, resumed(state, adam_bits=8)), 0.0
