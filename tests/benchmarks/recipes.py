"""Names of shipped recipes in; what each takes from an empty store (wall clock, processor time, memory), and the table that it ends with, out.

    python tests/benchmarks/recipes.py layer-sweep seed-pair controls [--keep FOLDER] [--threads N]

Each runs as a user would run it, in a process of its own with a store of its own; `--keep` leaves the run folders there.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleaved import headline, machine


def timed(name: str, folder: Path, threads: int) -> str:
    """One recipe, one line; the end of what it printed below. Raises SystemExit where it failed."""
    environment = {**os.environ, "SAEHUB_HOME": str(folder / "home"), "OMP_NUM_THREADS": str(threads)}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(["saehub", "recipe", "run", name, "--out", str(folder / name)], env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ends = [i for i, line in enumerate(done.stdout.splitlines()) if line.startswith(("verdicts (", "at a glance"))]
    table = "\n".join(done.stdout.splitlines()[ends[0] :]) if ends else ""
    return f"{name}: {wall:.0f} s, processor {worked:.0f} s, report {(folder / name / 'report.html').stat().st_size:,} bytes\n{table}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    print(headline({**machine(), "threads": given.threads}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            print(timed(name, (given.keep or Path(folder)).absolute(), given.threads), flush=True)


if __name__ == "__main__":
    main()
