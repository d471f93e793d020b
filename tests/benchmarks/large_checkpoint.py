"""How much memory a conversion of a large checkpoint takes: sizes in; peak memory over the start, against the largest tensor, out.

    python tests/benchmarks/large_checkpoint.py [--gib 5] [--dir FOLDER] [--json]

Writes a top-k SAE of that size (float32, d_in 4096) in saehub's own format, block by block, then runs each step in a process of its own:
saehub -> saelens and back without a certificate, load and save. Peak: the most that VmRSS rose, mapped pages included (sampled every 10 ms,
and VmHWM). The promise is 1.5 times the largest tensor. Needs three times the size on disk; `--gib 0.25` is a minute.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

D_IN, LIMIT = 4096, 1.5
STEPS = {
    "saehub -> saelens": "from saehub.checkpoint.convert import convert\nconvert(src, dst, 'saelens', verify=False)",
    "saelens -> saehub": "from saehub.checkpoint.convert import convert\nconvert(src, dst, 'saehub', verify=False)",
    "load and save": "from saehub.checkpoint.format import load, save\nsave(load(src), dst)",
}
CHILD = """
import json, sys, threading, time
import torch, safetensors.torch, saehub.checkpoint.convert, saehub.checkpoint.format, saehub.checkpoint.architectures.topk, saehub_saelens.mapping
torch.set_num_threads(1)
src, dst = sys.argv[1:3]
def kib(name):
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
base, most, done = kib('VmRSS'), [0, 0], threading.Event()
def watch():
    while not done.is_set():
        most[0], most[1] = max(most[0], kib('VmRSS')), max(most[1], kib('RssAnon'))
        time.sleep(0.01)
anon = kib('RssAnon')
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
start = time.perf_counter()
STEP
seconds = time.perf_counter() - start
done.set(); watcher.join()
peak = max(most[0], kib('VmHWM'))
print(json.dumps({'peak': (peak - base) * 1024, 'anonymous': (most[1] - anon) * 1024, 'seconds': seconds}))
"""


def make(folder: Path, gib: float) -> int:
    """A checkpoint of about `gib` GiB without ever holding a tensor of it; bytes of the largest tensor."""
    import torch
    from safetensors import safe_open

    from saehub.checkpoint import format as v1
    from saehub.checkpoint.config import SAEConfig
    from saehub.checkpoint.sae import SAE

    d_sae = max(256, int(gib * 2**30 / (2 * 4 * D_IN)) // 256 * 256)
    shapes = {"W_enc": [D_IN, d_sae], "W_dec": [d_sae, D_IN], "b_dec": [D_IN], "b_enc": [d_sae]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    raw, draw = folder / "raw.safetensors", torch.Generator().manual_seed(0)
    with open(raw, "wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for at in range(0, end, 2**26):
            stream.write(memoryview(torch.randn(min(2**26, end - at) // 4, generator=draw).numpy()).cast("B"))
    with safe_open(raw, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in shapes}
    v1.save(SAE.build(SAEConfig("topk", D_IN, d_sae, params={"k": 64}), tensors), folder / "saehub")
    raw.unlink()
    return 4 * D_IN * d_sae


def measure(step: str, src: Path, dst: Path) -> dict[str, float]:
    """One step in a fresh process."""
    done = subprocess.run([sys.executable, "-c", CHILD.replace("STEP", STEPS[step]), str(src), str(dst)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Print one line a step; 1 if a step took more than its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=5.0, help="size of the checkpoint (default 5)")
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder, rows, start = Path(tempfile.mkdtemp(prefix="saehub-large-", dir=args.dir)), [], time.perf_counter()
    try:
        largest = make(folder, args.gib)
        if not args.json:
            print(f"largest tensor {largest / 2**30:.2f} GiB, limit {LIMIT} x; made in {time.perf_counter() - start:.0f} s")
        plan = [("saehub -> saelens", "saehub", "saelens"), ("saelens -> saehub", "saelens", "back"), ("load and save", "saehub", "again")]
        for step, src, dst in plan:
            found = measure(step, folder / src, folder / dst)
            rows.append({"step": step, "largest": largest, **found, "ratio": found["peak"] / largest})
            if not args.json:
                r = rows[-1]
                print(f"{step:<20} peak +{r['peak'] / 2**30:.2f} GiB ({r['ratio']:.2f} x largest), anonymous +{r['anonymous'] / 2**30:.2f} GiB, {r['seconds']:.0f} s")
            if dst in ("back", "again"):
                same = all((folder / dst / name).read_bytes() == (folder / "saehub" / name).read_bytes() for name in ("sae.safetensors",)) if args.gib < 1 else None
                rows[-1]["same_bytes"] = same
                shutil.rmtree(folder / dst)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["ratio"] > LIMIT for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
