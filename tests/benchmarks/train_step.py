"""Time of one full training step of native/topk or native/batchtopk beside the peers'.

    python tests/benchmarks/train_step.py [--size M] [--auxk] [--architecture topk] [--rounds 5] [--one-thread] [--json]

Step: gradients, clipping (SAELens, dictionary_learning and we; Sparsify has none), projection, Adam, norms, deadness, on the same float32
batches. Everything runs twice: as shipped, and with an allocator that keeps memory (`interleaved.TUNED`). The products alone are the roofline.
`--one-thread` counts processor time instead of wall time, which neighbours on the machine do not change much. OMP_WAIT_POLICY is what saehub's
command line sets.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import interleaved
import torch
from torch import Tensor

SIZES = {"S": (256, 4096, 32, 2048), "M": (768, 16384, 32, 4096)}
ARCHITECTURES = ("topk", "batchtopk")


def rows_like_activations(batch: int, d: int, count: int, n_true: int = 4096, l0: int = 24, seed: int = 0) -> list[Tensor]:
    """Sparse positive combinations of unit directions of unequal frequency, noise and a mean; mean norm √d."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d, generator=g), dim=1)
    frequency = torch.arange(1, n_true + 1).float() ** -0.7
    batches = []
    for _ in range(count):
        indices = torch.multinomial(frequency, batch * l0, replacement=True, generator=g).view(batch, l0)
        x = torch.nn.functional.embedding_bag(indices, directions, per_sample_weights=2 * torch.rand(batch, l0, generator=g) + 0.5, mode="sum")
        x = x + 0.3 * torch.randn(batch, d, generator=g) * (l0 / d) ** 0.5 + 0.2
        batches.append(x * (d**0.5 / x.norm(dim=1).mean()))
    return batches


class Native:
    """Our session, with the kernels asked for."""

    def __init__(self, kernels: str, d: int, n_latents: int, k: int, batch: int, auxk: bool, architecture: str = "topk"):
        import peers

        from saehub.api import Job
        from saehub_native import config as configs
        from saehub_native.train import NativeTrainer

        held = os.environ.get("SAEHUB_KERNELS")
        os.environ["SAEHUB_KERNELS"] = kernels
        make = {"topk": configs.TopKConfig, "batchtopk": configs.BatchTopKConfig}[architecture]
        dead = {} if auxk else {"auxk_alpha": 0.0, "revive": 0.0}
        config = make(k=k, width=n_latents, batch=batch, lr=2e-4 / (n_latents / 2**14) ** 0.5, calibration=1024, dead_after=10**8, **dead)
        job = Job("benchmark", "resid_post.0", None, d, d, 100_000, batch, 100_000 * batch, 0)
        calibration = rows_like_activations(1024, d, 1, seed=9)[0]
        self.session = NativeTrainer(config).open(job, lambda n: (calibration[:n], None))
        self.dead_N = peers.dead_latents(n_latents) if auxk else None
        os.environ.pop("SAEHUB_KERNELS") if held is None else os.environ.update(SAEHUB_KERNELS=held)

    def step(self, x_BD: Tensor) -> None:
        if self.dead_N is not None:
            self.session.since_fired_F[self.dead_N] = 10**9
        self.session.step(x_BD)


def products(d: int, n_latents: int, batch: int) -> dict[str, object]:
    """The encoder's product alone, into memory that is there."""
    x, W = torch.randn(batch, d), torch.randn(n_latents, d)
    x16, W16 = x.bfloat16(), W.bfloat16()
    x8, W8 = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (x, W))
    chunk = 512
    out32, out16, out8 = (torch.empty(chunk, n_latents, dtype=t) for t in (torch.float32, torch.bfloat16, torch.int32))

    def over(call):
        return lambda _turn: [call(slice(i, i + chunk)) for i in range(0, batch, chunk)]

    return {
        "product float32, torch's default": over(lambda s: torch.mm(x[s], W.t(), out=out32)),
        "product bfloat16": over(lambda s: torch.mm(x16[s], W16.t(), out=out16)),
        "product int8": over(lambda s: torch._int_mm(x8[s], W8.t(), out=out8)),
    }


def measure(size: str, auxk: bool, architecture: str, rounds: int, one_thread: bool, rankings: bool) -> dict:
    """Seconds a round of everything at one size, in this process."""
    import peers

    if one_thread:
        torch.set_num_threads(1)
    d, n_latents, k, batch = SIZES[size]
    batches = rows_like_activations(batch, d, 4)
    arguments = (d, n_latents, k, batch, auxk, architecture)
    systems = {
        "native": Native("cpu", *arguments),
        **{f"native, {kind} ranking": Native(f"cpu:{kind}", *arguments) for kind in (("bfloat16", "float32") if rankings else ())},
        "native, plain torch": Native("reference", *arguments),
    }
    for system in systems.values():  # compiled, buffers there; before the peers, which change functions of the standard library
        system.step(batches[0])
        system.step(batches[1])
    systems |= {
        **({"Sparsify (Adam)": peers.Sparsify(*arguments)} if architecture == "topk" else {}),
        "dictionary_learning": peers.DictionaryLearning(*arguments),
        "SAELens": peers.SAELens(*arguments),
    }
    ways = {name: (lambda turn, system=system: system.step(batches[turn % 4])) for name, system in systems.items()}
    seconds = interleaved.interleave({**products(d, n_latents, batch), **ways}, rounds, time.process_time if one_thread else time.perf_counter)
    kernels = systems["native"].session.kernels
    return {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "ranking": kernels.ranker.kind,
        "audit": {"rows": kernels.audited, "missed": kernels.missed, "r": kernels.r, "exact a row": kernels.exact_a_row},
    }


def table(record: dict) -> str:
    """What is printed."""
    d, n_latents, k, batch = SIZES[record["size"]]
    lines = [
        interleaved.headline(record),
        f"{record['architecture']}, d {d}, {n_latents} latents, k {k}, batch {batch}; AuxK "
        + ("on, a quarter of the latents dead" if record["auxk"] else "off")
        + f"; native ranks in {record['as shipped']['ranking']}",
        f"{'processor ms a step, one thread' if record['one thread'] else 'ms a step: median [p10 p90]':36s}{'as shipped':>24s}{'/ native':>10s}{'tuned malloc':>24s}{'/ native':>10s}",
    ]
    columns = [record["as shipped"], record["tuned malloc"]]
    against = [interleaved.ratios(column["seconds"], "native") for column in columns]
    for name in columns[0]["seconds"]:
        line = f"{name:36s}"
        for column, ratio in zip(columns, against, strict=True):
            s = interleaved.spread([1e3 * v for v in column["seconds"][name]])
            line += f"{s['median']:10.1f} [{s['p10']:.0f} {s['p90']:.0f}]".rjust(24) + f"{ratio[name]:10.2f}"
        lines.append(line)
    for kind in ("bfloat16", "int8"):
        shares = [ratio[f"product {kind}"] for ratio in against]
        lines.append(f"{kind} product alone / whole native step: {shares[0]:.2f} as shipped, {shares[1]:.2f} tuned")
    lines.append(f"audit of native: {record['as shipped']['audit']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--auxk", action="store_true")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="topk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-thread", action="store_true")
    parser.add_argument("--rankings", action="store_true", help="also with the slower ranking products")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.size, options.auxk, options.architecture, options.rounds, options.one_thread, options.rankings)))
        return
    arguments = ["--part", "--size", options.size, "--architecture", options.architecture, "--rounds", str(options.rounds)]
    arguments += [name for name in ("--auxk", "--one-thread", "--rankings") if getattr(options, name[2:].replace("-", "_"))]
    record = {
        **interleaved.machine(),
        "size": options.size,
        "architecture": options.architecture,
        "auxk": options.auxk,
        "one thread": options.one_thread,
        "as shipped": interleaved.again_with({}, *arguments),
        "tuned malloc": interleaved.again_with(interleaved.TUNED, *arguments),
    }
    print(json.dumps(record) if options.json else table(record))


if __name__ == "__main__":
    main()
