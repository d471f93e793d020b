"""The Triton kernels in; whether they are right, whether they compile, and how fast a training step is beside the peers', out.

    python tests/benchmarks/gpu.py [--json FILE] [--minutes 8]      on a machine with a CUDA device: checks, then the benchmark
    TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --check       the checks alone, on a processor, slowly, at small sizes
    python tests/benchmarks/gpu.py --compile                        compiles every kernel for compute capability 9.0; needs no device

Needs torch, triton, numpy and safetensors; sparsify, dictionary_learning and sae_lens are timed where they can be imported. A step is a whole
one: selection, reconstruction, gradients, clipping, projection, Adam, counters. Steps are interleaved A, B, C … C, B, A on the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(Path(__file__).parent)]

import torch
from torch import Tensor

SIZES = {"A": (4096, 131_072, 64, 8192), "B": (2304, 65_536, 64, 8192)}  # d, latents, k, batch
EVERY = "every selected latent's float64 value within 8u·scale of the k-th"


def rows_of(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    """Sparse sums of 4,096 directions with a mean and some noise, float32, mean norm √d."""
    draw = torch.Generator(device=device).manual_seed(seed)
    D_FD = torch.nn.functional.normalize(torch.randn(4096, d, generator=draw, device=device), dim=1)
    chance_F = torch.arange(1, 4097, device=device, dtype=torch.float32) ** -0.7
    indices = torch.multinomial(chance_F, n * 24, replacement=True, generator=draw).view(n, 24)
    x_ND = torch.nn.functional.embedding_bag(indices, D_FD, per_sample_weights=0.5 + 2 * torch.rand(n, 24, generator=draw, device=device), mode="sum")
    x_ND += 0.2 + 0.3 * (24 / d) ** 0.5 * torch.randn(n, d, generator=draw, device=device)
    return x_ND * (d**0.5 / x_ND.norm(dim=1).mean())


# ---------------------------------------------------------------------- correctness
def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def checks(device: str) -> Iterator[tuple[str, float, float]]:
    """(what, measured error, bound), each kernel against plain torch or float64."""
    from saehub_native.kernels.audit import missed_rows
    from saehub_native.kernels.gpu import GROUP, GpuKernels
    from saehub_native.kernels.reference import ReferenceKernels

    small = device == "cpu"
    n, d, F, k = (6, 16, 528, 3) if small else (512, 520, 20_000, 32)
    draw = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(n, d, generator=draw).to(device), (torch.randn(F, d, generator=draw) / d**0.5).to(device)
    b_F = (0.1 * torch.randn(F, generator=draw)).to(device)
    gpu, plain = GpuKernels(), ReferenceKernels()
    gpu.r = 8 if small else gpu.r
    for by_size in (False, True):
        word = "|p|" if by_size else "relu"
        values_BC, score_BC, indices_BC, counts_B, bar_B = gpu.candidates(x_BD, W_FD, b_F, k + gpu.r, by_size)
        p_BF = x_BD.bfloat16().double() @ W_FD.bfloat16().double().T + b_F.double()
        s_BF = p_BF.abs() if by_size else p_BF.clamp_min(0)
        here_BC = torch.arange(indices_BC.shape[1], device=device) < counts_B[:, None]
        rounding = 2.0**-22 if gpu.interpreted else 2.0**-8  # scores are bfloat16 on a device
        yield f"encode, {word}: ranking scores", relative(score_BC[here_BC], s_BF.gather(1, indices_BC)[here_BC]), rounding
        maxima_BG = torch.nn.functional.pad(s_BF, (0, -F % GROUP)).unflatten(1, (-1, GROUP)).amax(2)
        bar = maxima_BG.topk(k + gpu.r, dim=1).values[:, -1]
        yield f"threshold, {word}: the (k + r)-th group maximum", relative(bar_B, bar), rounding
        lacking = (counts_B < k + gpu.r).sum() + sum(int((row[1:] <= row[:-1]).sum()) for row in (r[:c] for r, c in zip(indices_BC, counts_B, strict=True)))
        yield f"gather, {word}: rows with fewer than k + r candidates, or out of order", float(lacking), 0.0
        exact_BF = x_BD.double() @ W_FD.double().T + b_F.double()
        yield f"refine, {word}: exact values", relative(values_BC[here_BC], exact_BF.gather(1, indices_BC)[here_BC]), 1e-6
    for rule in ("top", "abs"):
        values_BK, indices_BK = gpu.encode_select(x_BD, W_FD, b_F, k, rule)
        missed = missed_rows(x_BD, W_FD, b_F, values_BK, indices_BK, k, rule)
        yield f"select, {rule}: rows where not {EVERY}", float(missed.sum()), 0.0
    tied_FD = W_FD.clone()
    tied_FD[1::2] = tied_FD[::2]  # every latent twice: no candidate stands clear of the bar, all rows must be taken from float32
    values_BK, indices_BK = gpu.encode_select(x_BD[:4], tied_FD, b_F * 0, k)
    yield "select, ties: against float32", relative(values_BK.sort().values, plain.encode_select(x_BD[:4], tied_FD, b_F * 0, k)[0].sort().values), 1e-6
    yield "select, no row positive: values", float(gpu.encode_select(x_BD[:4], W_FD, b_F - 100, k)[0].abs().sum()), 0.0

    y_BD = torch.randn(n, d, generator=draw).to(device)
    values_BK, indices_BK = plain.encode_select(x_BD, W_FD, b_F, k)
    values_BK[0] = 0
    results = [kernels.reconstruct(y_BD.clone(), values_BK, indices_BK, W_FD, 0.37) for kernels in (gpu, plain)]
    for name, found, expected in zip(("residual", "gradient", "value gradients", "squared error"), *results, strict=True):
        yield f"reconstruct: {name}", relative(found, expected), 2e-6
    yield from update_checks(gpu, plain, x_BD, indices_BK, values_BK, F)
    yield from training_checks(device)


def update_checks(gpu, plain, x_BD: Tensor, indices_BK: Tensor, values_BK: Tensor, F: int) -> Iterator[tuple[str, float, float]]:
    """The per-latent kernel in its three modes, with AuxK's dense rows and a projection, against dense float64."""
    from saehub_native.optim import Adam

    device, d = x_BD.device, x_BD.shape[1]
    draw = torch.Generator().manual_seed(1)
    W_FD = torch.nn.functional.normalize(torch.randn(F, d, generator=draw), dim=1).to(device)
    extra_N = torch.randperm(F, generator=draw)[: F // 8].to(device)
    extra_ND = torch.randn(len(extra_N), d, generator=draw).to(device)
    gpu.lazy = True
    sums = gpu.latent_sums(gpu.group(indices_BK, F), values_BK, x_BD).index_add_(0, extra_N, extra_ND)
    gpu.lazy, sums.sphere = False, True
    dense_FD = torch.zeros(F, d, dtype=torch.float64, device=device)
    for j in range(indices_BK.shape[1]):
        dense_FD.index_add_(0, indices_BK[:, j], values_BK[:, j, None].double() * x_BD.double())
    dense_FD[extra_N] += extra_ND.double()
    dense_FD -= (dense_FD * W_FD.double()).sum(1, keepdim=True) * W_FD.double()
    yield "latents: gradient", relative(sums.dense(W_FD), dense_FD), 1e-6
    square = float(dense_FD.square().sum())
    yield "latents: its square", abs(gpu.square(sums, W_FD) / square - 1), 1e-5
    yield "latents: square_bound below the square by", max(0.0, 1 - gpu.square_bound(sums) / square), 0.0
    sums.factor = 0.5
    adams = [Adam({"W": W_FD.clone()}), Adam({"W": W_FD.double().clone()})]
    gpu._low(adams[0].params["W"])
    for _ in range(3):
        adams[0].step({"W": sums}, 1e-2)
        weight = adams[1].params["W"]
        gradient = dense_of(plain, sums, weight)
        adams[1].step({"W": gradient * 0.5}, 1e-2)
        weight.div_(weight.norm(dim=1, keepdim=True))
    yield "update: weight after 3 steps", relative(adams[0].params["W"], adams[1].params["W"]), 2e-6
    yield "update: second moment", relative(adams[0].v["W"], adams[1].v["W"]), 1e-5
    copy = gpu._low(adams[0].params["W"])
    yield "update: bfloat16 copy", relative(copy, adams[0].params["W"]), 2.0**-8


def dense_of(plain, sums, W_FD: Tensor) -> Tensor:
    """The projected gradient of `sums` at W_FD, dense and in W_FD's dtype, before its factor."""
    g_FD = torch.zeros_like(W_FD)
    part = sums.parts[0]
    firing = part.firing
    for latent in firing.counts_F.nonzero().squeeze(1).tolist():
        pairs = slice(int(firing.offsets_F[latent]), int(firing.offsets_F[latent] + firing.counts_F[latent]))
        g_FD[latent] = part.weights_N[firing.order_N[pairs]].to(W_FD) @ part.source_BD[firing.rows_N[pairs]].to(W_FD)
    g_FD[sums.extra[0]] += sums.extra[1].to(W_FD)
    return g_FD - (g_FD * W_FD).sum(1, keepdim=True) * W_FD


def session(kernels: str, device: str, d: int, n_latents: int, k: int, batch: int, steps: int, **settings: object):
    """A native TopK training under those kernels."""
    from saehub.api import Job
    from saehub_native.config import TopKConfig
    from saehub_native.train import NativeTrainer

    os.environ["SAEHUB_KERNELS"] = kernels
    config = TopKConfig(k=k, width=n_latents, batch=batch, calibration=min(4096, 8 * batch), **settings)
    job = Job("gpu", "resid_post.0", None, d, d, steps, batch, steps * batch, 0, device=device)
    return NativeTrainer(config).open(job, lambda n: (rows_of(n, d, device, seed=9), None))


def training_checks(device: str) -> Iterator[tuple[str, float, float]]:
    """Whole steps: against the plain kernels, the same bits twice, and through a saved state."""
    small = device == "cpu"
    d, F, k, batch, steps = (8, 384, 2, 4, 3) if small else (256, 16_384, 16, 1024, 12)
    x = [rows_of(batch, d, device, seed=step) for step in range(steps)]
    settings = {"dead_after": 2 * batch, "k_aux": 4}

    def train(kernels: str, stop: int | None = None, session_=None, start: int = 0):
        session_ = session_ or session(kernels, device, d, F, k, batch, steps, **settings)
        if kernels == "gpu":
            session_.kernels.r = 8 if small else session_.kernels.r
        for step in range(start, steps if stop is None else stop):
            session_.step(x[step])
        return session_

    whole, plain = train("gpu"), train("reference")
    for name, weight in whole.params.items():
        yield f"training, {steps} steps: {name} against the plain kernels", relative(weight, plain.params[name]), 1e-4
    again = train("gpu")
    yield "training: bits that differ the second time", float(sum((whole.params[n] != again.params[n]).sum() for n in whole.params)), 0.0
    tensors, data = train("gpu", steps // 2).state()
    resumed = session("gpu", device, d, F, k, batch, steps, **settings)
    resumed.load_state({name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(data)))
    resumed = train("gpu", None, resumed, steps // 2)
    yield "training: bits that differ after a resume", float(sum((whole.params[n] != resumed.params[n]).sum() for n in whole.params)), 0.0


# ---------------------------------------------------------------------- compilation
def compile_all(capability: int = 90) -> list[dict]:
    """Every kernel to machine code for a CUDA device that need not be there, at the sizes of SIZES["A"]."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from saehub_native.kernels import triton_encode as e
    from saehub_native.kernels import triton_latents as l

    f, i, q, h = "*fp32", "*i32", "*i64", "*bf16"
    shape = {"n_rows": "i32", "n_latents": "i32", "d": "i32", "n_groups": "i32", "wanted": "i32", "capacity": "i32"}
    encode = {"x_ptr": h, "W_ptr": h, "b_ptr": f, "scores_ptr": h, "maxima_ptr": f}
    pairs = {"offsets_ptr": q, "counts_ptr": q, "rows_ptr": q, "order_ptr": q, "weights_ptr": f, "source_ptr": f, "slots_ptr": i, "extra_ptr": f}
    numbers = dict.fromkeys(("factor", "beta1", "beta2", "size", "spread", "eps", "tiny"), "fp32")
    plan: list[tuple] = [
        *((e.encode, encode, dict(UPCAST=False, BY_SIZE=s, GROUP=16, BM=128, BN=128, BK=64), dict(num_warps=8, num_stages=3)) for s in (False, True)),
        (e.threshold, {"maxima_ptr": f, "out_ptr": f}, dict(BLOCK=8192), {}),
        (e.gather, {"scores_ptr": h, "maxima_ptr": f, "threshold_ptr": f, "indices_ptr": i, "counts_ptr": i}, dict(GROUP=16, GROUPS=64), {}),
        (e.refine, {"x_ptr": f, "W_ptr": f, "b_ptr": f, "indices_ptr": i, "counts_ptr": i, "values_ptr": f}, dict(BLOCK=16, D=4096), {}),
        (l.reconstruct, dict.fromkeys(("target_ptr", "values_ptr", "W_ptr", "grad_ptr", "delta_ptr", "error_ptr"), f) | {"indices_ptr": q, "weight": "fp32"},
         dict(K=64, D=4096), {}),
        *((l.latents, pairs | numbers | {"W_ptr": f, "m_ptr": f, "v_ptr": f, "out_ptr": h if mode == l.UPDATE else f},
           dict(SPHERE=True, EXTRA=True, SHADOW=mode == l.UPDATE, MODE=mode, D=4096), {}) for mode in (l.STORE, l.SQUARE, l.UPDATE)),
    ]  # fmt: skip
    found = []
    for kernel, signature, constants, options in plan:
        types = {name: "constexpr" if name in constants else (signature | shape).get(name) or signature[name] for name in kernel.arg_names}
        made = compile(ASTSource(fn=kernel, signature=types, constexprs=constants), target=GPUTarget("cuda", capability, 32), options=options)
        found.append({"kernel": kernel.__name__, "bytes": len(made.asm["cubin"]), "shared": made.metadata.shared})
    return found


# ---------------------------------------------------------------------- benchmark
def runners(size: tuple[int, int, int, int], device: str) -> Iterator[tuple[str, Callable[[], Callable[[Tensor], object]]]]:
    """(name, maker of a step) of ours and of every peer that can be imported, as shipped and under bfloat16 autocast."""
    d, F, k, batch = size

    def native(kernels: str):
        def make() -> Callable[[Tensor], object]:
            return session(kernels, device, d, F, k, batch, 100_000).step

        return make

    yield "saehub gpu", native("gpu")
    yield "saehub reference (plain torch)", native("reference")
    import peers

    for name in ("Sparsify", "DictionaryLearning", "SAELens"):
        for autocast in (False, True):

            def make(name: str = name, autocast: bool = autocast) -> Callable[[Tensor], object]:
                peer = getattr(peers, name)(d, F, k, batch, False, device=device)

                def step(x_BD: Tensor) -> object:
                    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                        return peer.step(x_BD)

                return step

            yield f"{name}, {'bfloat16 autocast' if autocast else 'as shipped'}", make


def benchmark(size: tuple[int, int, int, int], device: str, until: float) -> dict[str, dict]:
    """Milliseconds a step: median, p10 and p90 of interleaved rounds. One trainer is held at a time: some need most of the memory."""
    d, F, k, batch = size
    x = [rows_of(batch, d, device, seed=seed) for seed in range(4)]
    found: dict[str, dict] = {}
    makers = list(runners(size, device))
    for order in (makers, makers[::-1]):
        for name, make in order:
            if time.monotonic() > until or found.get(name, {}).get("failed"):
                continue
            try:
                step, times = make(), []
                for i in range(3 + 8):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    step(x[i % len(x)])
                    torch.cuda.synchronize()
                    times.append(1000 * (time.perf_counter() - start))
                found.setdefault(name, {"ms": []})["ms"] += times[3:]
            except Exception as error:  # a peer that is absent or does not fit is a row that says so
                found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
            step = None
            torch.cuda.empty_cache()
    for row in found.values():
        if "ms" in row:
            tenths = statistics.quantiles(row["ms"], n=10)
            row |= {"median": statistics.median(row["ms"]), "p10": tenths[0], "p90": tenths[-1], "rounds": len(row.pop("ms"))}
    return found


def gemm_ms(size: tuple[int, int, int, int], device: str) -> float:
    """Milliseconds of the encoder's product alone, bfloat16, by the library that torch uses."""
    d, F, _, batch = size
    a, b = torch.randn(batch, d, device=device, dtype=torch.bfloat16), torch.randn(F, d, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for at in range(0, batch, 2048):
            a[at : at + 2048] @ b.T
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> int:
    """Exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="the checks alone")
    parser.add_argument("--compile", action="store_true", help="compile for compute capability 9.0 alone")
    parser.add_argument("--json", type=Path, help="also write a file")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so many (default 8)")
    args = parser.parse_args()
    import triton

    until = time.monotonic() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "none"
    report: dict = {"date": time.strftime("%Y-%m-%d"), "card": card, "torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps(report))
    if args.compile:
        report["compiled"] = compile_all()
        for row in report["compiled"]:
            print(f"{row['kernel']:<12} {row['bytes']:>8} bytes of machine code, {row['shared']} bytes shared")
    else:
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("there is no CUDA device: TRITON_INTERPRET=1 with --check, or --compile")
        report["checks"] = [{"what": what, "error": error, "bound": bound, "ok": error <= bound} for what, error, bound in checks(device)]
        for row in report["checks"]:
            print(f"{'ok  ' if row['ok'] else 'FAIL'}  {row['what']}: {row['error']:.2g} (at most {row['bound']:.2g})")
        if device == "cuda" and not args.check:
            for name, size in SIZES.items():
                report[name] = {"size": dict(zip(("d", "latents", "k", "batch"), size, strict=True)), "gemm_ms": gemm_ms(size, device)}
                report[name]["steps"] = benchmark(size, device, until)
                ours = report[name]["steps"].get("saehub gpu", {}).get("median")
                print(f"\n{report[name]['size']}: the bfloat16 product alone takes {report[name]['gemm_ms']:.2f} ms")
                for who, row in report[name]["steps"].items():
                    times = f"{row['median']:8.2f} ms ({row['p10']:.2f} – {row['p90']:.2f})" if "median" in row else row["failed"]
                    print(f"  {who:<40} {times}" + (f"   {row['median'] / ours:.2f} × ours" if ours and "median" in row else ""))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(not row["ok"] for row in report.get("checks", ())))


if __name__ == "__main__":
    raise SystemExit(main())
