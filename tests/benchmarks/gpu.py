"""The Triton kernels in; whether they are right, whether they compile, and how fast a training step is beside the peers', out.

    python tests/benchmarks/gpu.py [--json FILE] [--minutes 8]      on a machine with a CUDA device: checks, then the benchmark
    TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --check       the checks alone, on a processor, slowly, at small sizes
    python tests/benchmarks/gpu.py --compile                        compiles every kernel for compute capability 9.0; needs no device

Needs torch, triton, numpy and safetensors; sparsify, dictionary_learning and sae_lens are timed where they can be imported. A step is a whole
one: selection, reconstruction, gradients, clipping, projection, Adam, counters.

On a device every part runs in a process of its own, because a kernel that goes astray takes its process's CUDA context with it: what was
found before stays, the row says how it died, and the rest goes on. The JSON file, and the table beside it (.txt), are written anew after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(Path(__file__).parent)]

SIZES = {"A": (4096, 131_072, 64, 8192), "B": (2304, 65_536, 64, 8192)}  # d, latents, k, batch
PEERS = {"Sparsify": "eai-sparsify", "DictionaryLearning": "dictionary-learning", "SAELens": "sae-lens"}
OURS = {  # name: kernels, settings, architecture
    "saehub gpu": ("gpu", {}, "topk"),
    "saehub gpu, 8-bit Adam": ("gpu", {"adam_bits": 8}, "topk"),
    "saehub gpu, torch's product": ("gpu:library", {}, "topk"),
    "saehub gpu, torch's product, 8-bit Adam": ("gpu:library", {"adam_bits": 8}, "topk"),
    "saehub gpu, op by op": ("gpu", {}, "topk"),
    "saehub gpu, AuxK with a quarter of the latents dead": ("gpu", {"auxk_alpha": 1 / 32}, "topk"),
    "saehub gpu, BatchTopK": ("gpu", {}, "batchtopk"),
    "saehub gpu:float32": ("gpu:float32", {}, "topk"),
    "saehub reference (plain torch)": ("reference", {}, "topk"),
}
MARK = "@@ "
WARM, TIMED, SECONDS = 6, 30, 8.0  # steps that are not counted; at most so many that are, in at most so many seconds
SMALL = ("k", "wanted", "capacity", "count_ptr", "scale_ptr", "numbers_ptr", "prefix_ptr")  # arguments that need not be multiples of 16
TILES = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 256, 32, 8, 4))


def say(**row: object) -> None:
    """A row to the parent process."""
    print(MARK + json.dumps(row), flush=True)


def short(error: BaseException) -> str:
    """One line. An error that takes the CUDA context with it ends the process: the parent reports it and begins another one."""
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if any(
        word in line
        for word in (
            "CUDA error",
            "AcceleratorError",
            "illegal memory",
            "misaligned address",
            "unspecified launch",
            "CUBLAS_STATUS_EXECUTION",
        )
    ):
        print(line, file=sys.stderr, flush=True)
        os._exit(3)
    return line


# ---------------------------------------------------------------------- compilation
def compile_all(only: list[str] | None = None, capability: int = 90) -> Iterator[dict]:
    """Every kernel to machine code for a CUDA device that need not be there, at the sizes of SIZES["A"]."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from saehub_native.kernels import gpu_dead, triton_batch, triton_dead, triton_encode, triton_latents
    from saehub_native.kernels.gpu import SMALL_TILES
    from saehub_native.kernels.gpu import TILES as CHOSEN
    from saehub_native.kernels.gpu_common import warps_for

    e, l, a = triton_encode, triton_latents, triton_dead
    f, i, q, h, u = "*fp32", "*i32", "*i64", "*bf16", "*u8"
    shape = dict.fromkeys(("n_rows", "n_latents", "d", "k", "n_groups", "wanted", "capacity", "first", "room", "stride", "n"), "i32")
    encode = {"x_ptr": h, "W_ptr": h, "b_ptr": f, "scores_ptr": h, "maxima_ptr": f}
    pairs = {
        "offsets_ptr": q,
        "counts_ptr": q,
        "rows_ptr": q,
        "order_ptr": q,
        "weights_ptr": f,
        "source_ptr": f,
        "slots_ptr": i,
        "extra_ptr": f,
    }
    floats = dict.fromkeys(
        (
            "numbers_ptr",
            "W_ptr",
            "m_scale_ptr",
            "v_scale_ptr",
            "norms_ptr",
            "residual_ptr",
            "scale_ptr",
            "grad_ptr",
            "error_ptr",
            "acts_ptr",
            "a_ptr",
            "sums_ptr",
            "p_ptr",
        ),
        f,
    )
    floats |= dict.fromkeys(("new1", "beta2", "new2", "eps", "tiny", "weight"), "fp32")
    listed = {"rows_ptr": i, "count_ptr": i, "list_ptr": i, "x_ptr": f, "b_ptr": f, "out_ptr": f}

    def dead_ways() -> Iterator[tuple[dict, dict]]:
        for precision, (BM, BN, BK, warps, stages) in (("tf32", gpu_dead.TILE), ("ieee", gpu_dead.PLAIN_TILE)):
            yield dict(PRECISION=precision, BM=BM, BN=BN, BK=BK), dict(num_warps=warps, num_stages=stages)

    tiles = [CHOSEN, SMALL_TILES, *(tile for tile in TILES if tile != CHOSEN)]
    plan: list[tuple] = [
        *((e.encode, encode, dict(UPCAST=False, BY_SIZE=False, GROUP=16, BM=t[0], BN=t[1], BK=t[2]), dict(num_warps=t[3], num_stages=t[4])) for t in tiles),
        (e.encode, encode, dict(UPCAST=False, BY_SIZE=True, GROUP=16, BM=CHOSEN[0], BN=CHOSEN[1], BK=CHOSEN[2]), dict(num_warps=CHOSEN[3], num_stages=CHOSEN[4])),
        (e.finish, {"scores_ptr": h, "b_ptr": f, "maxima_ptr": f}, dict(BY_SIZE=False, GROUP=16, GROUPS=128), {}),
        (e.threshold, {"maxima_ptr": f, "out_ptr": f}, dict(BLOCK=8192), {}),
        (e.gather, {"scores_ptr": h, "maxima_ptr": f, "threshold_ptr": f, "indices_ptr": i, "counts_ptr": i}, dict(GROUP=16, GROUPS=64), {}),
        (e.refine, {"x_ptr": f, "b_ptr": f, "indices_ptr": i, "counts_ptr": i, "values_ptr": f}, dict(BLOCK=16, D=4096), {}),
        (e.exact, listed, dict(BM=16, BN=64, BK=32), {}),
        *((e.choose, listed | {"values_ptr": f, "indices_ptr": q}, dict(BY_SIZE=s, BLOCK=1024), {}) for s in (False, True)),
        *((triton_batch.histogram, {"values_ptr": f, "prefix_ptr": i, "counts_ptr": i}, dict(SHIFT=s, BINS=b, FIRST=s == 21, BLOCK=1024, PASSES=8), {}) for s, b in ((21, 1024), (11, 1024), (0, 2048))),
        (l.reconstruct, dict.fromkeys(("target_ptr", "values_ptr", "delta_ptr"), f) | {"indices_ptr": q}, dict(K=64, C=256), dict(num_warps=8)),
        (l.totals, pairs | {"out_ptr": f}, dict(BLOCK=128), dict(num_warps=1)),
        (l.bound, pairs | {"out_ptr": f}, dict(EXTRA=True, BLOCK=128, D=4096), dict(num_warps=1)),
        *((l.latents, pairs | {"m_ptr": u if bits == 8 else f, "v_ptr": u if bits == 8 else f, "out_ptr": h if mode == l.UPDATE else f},
           dict(SPHERE=True, EXTRA=True, SHADOW=mode == l.UPDATE, MODE=mode, BITS=bits, D=4096, BLOCK=256), dict(num_warps=warps_for(4096)))
          for mode, bits in ((l.STORE, 32), (l.SQUARE, 32), (l.UPDATE, 32), (l.UPDATE, 8))),
        *((a.scores, listed, dict(MODE=mode, **dead), options) for dead, options in dead_ways() for mode in (a.RELU, a.SIGNED, a.MASK)),
        (a.keep, listed, dict(BLOCK=1024), {}),
        *((a.miss, listed, dead, options) for dead, options in dead_ways()),
        *((a.gradients, listed | {"source_ptr": f}, dict(FIRST=x, **dead), options) for dead, options in dead_ways() for x in (True, False)),
    ]  # fmt: skip
    for kernel, signature, constants, options in plan:
        types = {name: "constexpr" if name in constants else (floats | signature).get(name) or shape[name] for name in kernel.arg_names}
        which = kernel.__module__.rpartition("_")[2] + "." + kernel.__name__
        if only and which not in only:
            continue
        try:
            # What a launch says of its arguments: pointers and sizes are multiples of 16, so that loads are wide and can be pipelined.
            attributes = {
                (at,): [["tt.divisibility", 16]]
                for at, name in enumerate(kernel.arg_names)
                if types[name] not in ("constexpr", "fp32") and name not in SMALL
            }
            made = compile(
                ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
            yield {
                "kernel": which,
                "constants": constants,
                "options": options,
                "bytes": len(made.asm["cubin"]),
                "shared": made.metadata.shared,
            }
        except Exception as error:
            yield {"kernel": which, "constants": constants, "options": options, "failed": short(error)}


# ---------------------------------------------------------------------- parts, each in a process of its own on a device
def time_steps(step: Callable, x: list, until: float) -> dict:
    """Milliseconds a step: median, p10, p90."""
    import torch

    times, begun = [], None
    for i in range(WARM + TIMED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(x[i % len(x)])
        torch.cuda.synchronize()
        now = time.perf_counter()
        if i >= WARM:
            times.append(1000 * (now - start))
            begun = begun or start
            if len(times) >= 3 and (now - begun > SECONDS or time.time() > until):
                break
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth], "steps": len(ordered)}


def ours(name: str, size: tuple[int, int, int, int]) -> tuple[Callable, object]:
    """One of `OURS`: its step and its session."""
    from gpu_checks import session

    d, F, k, batch = size
    kernels, settings, architecture = OURS[name]
    made = session(kernels, "cuda", d, F, k, batch, 100_000, architecture, **({"auxk_alpha": 0.0} | settings))
    if name.endswith("op by op"):
        made.replay.reason = "asked for"
    if "dead" in name:
        from peers import dead_latents

        dead_N = dead_latents(F).cuda()

        def step(x_BD: object) -> None:
            made.since_fired_F[dead_N] = 10**9
            made.step(x_BD)

        return step, made
    return made.step, made


def peer(name: str, autocast: bool, size: tuple[int, int, int, int]) -> Callable:
    """A peer's step."""
    import peers
    import torch

    d, F, k, batch = size
    made = getattr(peers, name)(d, F, k, batch, False, device="cuda")

    def step(x_BD: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            made.step(x_BD)

    return step


def part_steps(size_name: str, names: list[str], until: float) -> None:
    """Time some systems at a size; a system that does not fit gets half the batch, and its row says so."""
    import torch
    from gpu_checks import rows_of

    d, F, k, batch = SIZES[size_name]
    x = [rows_of(batch, d, "cuda", seed=seed) for seed in range(4)]
    for name in names:
        say(begin=name)
        if time.time() > until:
            say(row=name, failed="no time was left")
            continue
        fitting, row = batch, {}
        while True:
            step = made = None
            try:
                if name in OURS:
                    step, made = ours(name, (d, F, k, fitting))
                else:
                    who, _, how = name.partition(", ")
                    step = peer(who, how != "as shipped", (d, F, k, fitting))
                torch.cuda.reset_peak_memory_stats()
                row = time_steps(step, [rows[:fitting] for rows in x], until)
                row |= {"batch": fitting, "GB": torch.cuda.max_memory_allocated() / 1e9}
                replay = getattr(made, "replay", None)
                if name in OURS:
                    row |= {"graph": replay.reason or f"{replay.replayed} of its steps" if replay else "none", "cautions": made.cautions()}
                    again = getattr(made.kernels, "again", None)  # rows of a batch that were settled in float32
                    row |= {
                        "r": getattr(made.kernels, "r", None),
                        "again": None if again is None else int(again),
                        "fvu": made.metrics()["fvu"],
                    }
            except torch.OutOfMemoryError:
                row = {"failed": f"does not fit at a batch of {fitting}"}
            except Exception as error:  # a peer that is absent, a kernel that does not compile
                row = {"failed": short(error)}
            step = made = replay = None
            torch.cuda.empty_cache()
            if "does not fit" not in row.get("failed", "") or fitting <= 1024 or time.time() > until:
                break
            fitting //= 2
        say(row=name, **row)


def part_kernels(size_name: str, until: float) -> None:
    """Milliseconds of each kernel at a size, and of torch's products: where a step's time goes, and which tiles would do better."""
    import torch
    from gpu_checks import rows_of

    from saehub_native.kernels.gpu import GpuKernels
    from saehub_native.kernels.gpu_common import GROUP, SCORE_BYTES
    from saehub_native.optim import Adam
    from saehub_native.optim8 import Adam8

    d, F, k, batch = SIZES[size_name]
    rows = min(batch, SCORE_BYTES // (2 * F))
    x_BD = rows_of(batch, d, "cuda")
    W_FD = torch.nn.functional.normalize(torch.randn(F, d, device="cuda"), dim=1)
    b_F, low_FD, low_BD = torch.zeros(F, device="cuda"), W_FD.bfloat16(), x_BD.bfloat16()
    kernels = GpuKernels()
    chunk_BD = x_BD[:rows]
    scores_BF, maxima_BG = torch.empty(rows, F, device="cuda", dtype=torch.bfloat16), torch.empty(rows, -(-F // GROUP), device="cuda")

    def measure(name: str, work: Callable[[], object], share: float) -> None:
        """Of one batch: `share` is how much of it the work does."""
        say(begin=name)
        if time.time() > until:
            say(row=name, failed="no time was left")
            return
        try:
            for _ in range(2):
                work()
            times = []
            for _ in range(7):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                work()
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop))
            say(row=name, median=statistics.median(times) / share)
        except Exception as error:
            say(row=name, failed=short(error))

    share = rows / batch
    measure("torch's bfloat16 product", lambda: torch.mm(low_BD[:rows], low_FD.t(), out=scores_BF), share)
    for tiles in TILES:

        def encode(tiles: tuple = tiles) -> None:
            kernels.tiles = tiles
            kernels.scores(chunk_BD, W_FD, b_F, False, out=(scores_BF, maxima_BG))

        kernels.kind = "bfloat16"
        measure(f"encode {'x'.join(map(str, tiles))}", encode, share)

    def by_library() -> None:
        kernels.kind = "library"
        kernels.scores(chunk_BD, W_FD, b_F, False, out=(scores_BF, maxima_BG))

    measure("torch's product, finish", by_library, share)
    measure("threshold, gather, refine", lambda: kernels.candidates(chunk_BD, W_FD, b_F, k + kernels.r, scores_BF, maxima_BG), share)
    measure("torch.topk of the scores", lambda: scores_BF.topk(k, dim=1), share)
    measure("selection, whole", lambda: (setattr(kernels, "selections", 1), kernels.encode_select(x_BD, W_FD, b_F, k)), 1)
    del scores_BF, maxima_BG
    try:
        values_BK, indices_BK = kernels.encode_select(x_BD, W_FD, b_F, k)
    except Exception:  # it has its own row above
        indices_BK, values_BK = torch.randint(F, (batch, k), device="cuda"), torch.rand(batch, k, device="cuda")
    measure("reconstruct", lambda: kernels.reconstruct(x_BD.clone(), values_BK, indices_BK, W_FD, 1e-6), 1)
    measure("group", lambda: kernels.group(indices_BK, F, values_BK), 1)
    firing = kernels.group(indices_BK, F, values_BK)
    measure("totals", lambda: kernels.latent_sums(firing, values_BK, torch.ones(batch, 1, device="cuda")), 1)
    kernels.lazy = True
    sums = kernels.latent_sums(firing, values_BK, x_BD)
    measure("bound", lambda: kernels._square_bound(sums), 1)
    measure("square", lambda: kernels._square(sums, W_FD, torch.ones((), device="cuda")), 1)
    for name, make in (("update", Adam), ("update, 8 bits", Adam8)):
        try:
            adam = make({"W": W_FD})
            measure(name, lambda adam=adam: adam.step({"W": sums}, 1e-4), 1)
        except torch.OutOfMemoryError as error:
            say(row=name, failed=short(error))
        adam = None
        torch.cuda.empty_cache()
    measure("∂b_dec through the encoder (a mat-vec)", lambda: b_F @ W_FD, 1)


def part_checks(names: list[str], until: float) -> None:
    """Groups of checks on the device."""
    import gpu_checks

    for name in names:
        say(begin=name)
        if time.time() > until:
            say(row=name, failed="no time was left")
            continue
        try:
            for what, error, bound in getattr(gpu_checks, name)("cuda"):
                say(check={"what": what, "error": error, "bound": bound, "ok": error <= bound})
            say(row=name)
        except Exception as error:
            say(row=name, failed=short(error))


# ---------------------------------------------------------------------- the parent
def run_part(part: str, names: list[str], until: float, limit: float, heard: Callable[[dict], None]) -> None:
    """Run a part's rows in a process; one that dies, or does not come back, costs its own row, and the rows after it run in the next process."""
    left = list(names)
    while left and time.time() < until:
        current = left[0]
        with tempfile.TemporaryFile("w+") as errors:
            words = [sys.executable, __file__, "--part", part, "--rows", json.dumps(left), "--until", str(until)]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
            lines: queue.Queue[str | None] = queue.Queue()

            def read(process: subprocess.Popen = process, lines: queue.Queue = lines) -> None:
                for line in process.stdout:
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, daemon=True).start()
            why, last = "", time.time()
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    if time.time() - last > limit or time.time() > until + 5:
                        why = f"no answer in {limit:.0f} seconds" if time.time() - last > limit else "no time was left"
                        process.kill()
                        break
                    continue
                if line is None:
                    break
                if not line.startswith(MARK):
                    continue
                last, message = time.time(), json.loads(line.removeprefix(MARK))
                if "begin" in message:
                    current = message["begin"]
                else:
                    heard(message)
                    if "row" in message and message["row"] in left:
                        left.remove(message["row"])
            code = process.wait()
            if left and (code or why):
                errors.seek(0)
                tail = [line.strip() for line in errors.read().splitlines() if line.strip()][-1:]
                gone = current if current in left else left[0]
                heard({"row": gone, "failed": f"its process ended: {why or f'exit code {code}'} {' '.join(tail)[:200]}".strip()})
                left.remove(gone)
            elif left:
                return
    for name in left:
        heard({"row": name, "failed": "no time was left"})


def device_report(report: dict, args: argparse.Namespace, started: float, write: Callable[[], None], tell: Callable[[str], None]) -> None:
    """The whole run on a device, written after each row."""
    end = started + 60 * args.minutes
    report["checks"] = []

    def check(message: dict) -> None:
        if "check" in message:
            row = message["check"]
        elif "failed" in message:
            row = {"what": f"{message['row']}: {message['failed']}", "error": float("inf"), "bound": 0.0, "ok": False}
        else:
            return
        report["checks"].append(row)
        tell(f"{'ok  ' if row['ok'] else 'FAIL'}  {row['what']}: {row['error']:.2g} (at most {row['bound']:.2g})")
        write()

    groups = ["selection", "rows", "updates", "training", "dead_latents", "batch_selection"]
    run_part("checks", groups, end if args.check else started + 0.25 * (end - started), 100, check)
    if args.check:
        return
    ends = {"A": started + 0.66 * (end - started), "B": end - 10}
    for name, size in SIZES.items():
        found = report[name] = {"size": dict(zip(("d", "latents", "k", "batch"), size, strict=True)), "steps": {}, "kernels": {}}
        tell(f"\n{found['size']}")

        def heard(message: dict, found: dict = found, kind: str = "steps") -> None:
            row = {key: value for key, value in message.items() if key != "row"}
            found[kind][message["row"]] = row
            base = found["steps"].get("saehub gpu", {}).get("median")
            if "median" in row:
                each = SIZES["A"][3] / row.get("batch", SIZES["A"][3])
                text = f"{row['median']:9.2f} ms" + (f" ({row['p10']:.2f} – {row['p90']:.2f}), {row['GB']:.0f} GB" if "GB" in row else "")
                text += f", batch {row['batch']}" if each != 1 else ""
                if kind == "steps" and base:
                    row["times_ours"] = row["median"] * each / base
                    text += f"   {row['times_ours']:.2f} × ours"
            else:
                text = row.get("failed", "")
            tell(f"  {message['row']:<56} {text}")
            write()

        names = list(OURS)
        rows = {autocast: [f"{who}, {'bfloat16 autocast' if autocast else 'as shipped'}" for who in PEERS] for autocast in (True, False)}
        steps, until = f"steps:{name}", ends[name]
        run_part(steps, names[:2], until, 100, heard)
        for row in rows[True]:
            run_part(steps, [row], until, 100, heard)
        run_part(f"kernels:{name}", ["kernels"], until, 60, lambda message, heard=heard: heard(message, kind="kernels"))
        run_part(steps, names[2:4], until, 100, heard)
        for row in rows[False]:
            run_part(steps, [row], until, 100, heard)
        run_part(steps, names[4:], until, 100, heard)


def main() -> int:
    """Exit code 1 if a check fails."""
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="the checks alone")
    parser.add_argument("--compile", action="store_true", help="compile for compute capability 9.0 alone")
    parser.add_argument("--json", type=Path, help="also write a file")
    parser.add_argument("--minutes", type=float, default=8.0, help="be done after so many (default 8)")
    parser.add_argument("--only", help="these groups of checks (on a processor), or these kernels to compile, comma-separated")
    for hidden in ("--part", "--rows", "--until"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        kind, _, size = args.part.partition(":")
        rows, until = json.loads(args.rows), float(args.until)
        if kind == "checks":
            part_checks(rows, until)
        elif kind == "steps":
            part_steps(size, rows, until)
        else:
            say(begin="kernels")
            part_kernels(size, until)
            say(row="kernels", failed="")
        return 0

    import torch
    import triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "none"
    table: list[str] = []

    def tell(line: str) -> None:
        table.append(line)
        print(line, flush=True)

    report: dict = {
        "date": time.strftime("%Y-%m-%d"),
        "card": card,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    report |= {"cuda": torch.version.cuda, "peers": versions(), "command": " ".join(["python", *(Path(sys.argv[0]).name, *sys.argv[1:])])}
    tell(json.dumps(report))

    def write() -> None:
        if args.json:
            report["seconds"] = round(time.time() - started)
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            args.json.with_suffix(".txt").write_text("\n".join(table) + "\n", encoding="utf-8")

    if args.compile:
        report["compiled"] = []
        for row in compile_all(args.only.split(",") if args.only else None):
            report["compiled"].append(row)
            tell(
                f"{row['kernel']:<20} {row.get('bytes', 0):>8} bytes of machine code, {row.get('shared', 0):>6} shared {row.get('failed', '')}"
            )
    elif device == "cuda":
        device_report(report, args, started, write, tell)
    else:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("there is no CUDA device: TRITON_INTERPRET=1 with --check, or --compile")
        from gpu_checks import all_checks

        report["checks"] = []
        for what, error, bound in all_checks(device, args.only.split(",") if args.only else None):
            report["checks"].append({"what": what, "error": error, "bound": bound, "ok": error <= bound})
            tell(f"{'ok  ' if error <= bound else 'FAIL'}  {what}: {error:.2g} (at most {bound:.2g})")
    write()
    return int(any(not row["ok"] for row in report.get("checks", ())) or any("failed" in row for row in report.get("compiled", ())))


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for distribution in PEERS.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
