"""Report pages in; what a real headless Chromium says about them out: console messages, network requests, size, text without script, a screenshot.

    python tests/benchmarks/browser.py RUN/report.html --out shots        # needs chromium (apt-get install chromium) on the PATH

Exit code 1 if the page writes to the console, asks for anything but itself, is 3 MB or more, or shows no text without script.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT = 3_000_000


def browser() -> str:
    """The first that is installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit("no Chromium on the PATH; apt-get install chromium")
    return found


def look(page: Path, shot: Path) -> dict:
    """Open `page` with the network log on; what was asked for and said."""
    done, requests = _open(page, f"--screenshot={shot}", "--window-size=1180,5200")
    shown, _ = _open(page, "--dump-dom")
    return {
        "page": page.name,
        "bytes": page.stat().st_size,
        "console": re.findall(r"CONSOLE[^\n]*", done.stderr),
        "requests": requests,
        "scripts": shown.stdout.count("<script"),
        "words": len(re.sub(r"(?s:<style.*?</style>)|<[^>]+>", " ", shown.stdout).split()),
        "screenshot": str(shot) if shot.is_file() else None,
    }


def _open(page: Path, *more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """(the browser's output, the addresses that the page asked for: those with an initiator; the browser's own errands are of "not an origin")."""
    address = page.absolute().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        command = [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--log-net-log={log}", *more, address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        events = _events(log.read_text(encoding="utf-8")) if log.is_file() else []
    asked = [event.get("params") or {} for event in events]
    return done, sorted({known["url"] for known in asked if known.get("url") and known.get("initiator", "not an origin") != "not an origin"})


def control() -> None:
    """A page that does ask for something must be caught, or nothing that this script says is worth anything."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "control.html"
        page.write_text('<!DOCTYPE html><title>t</title><img src="http://127.0.0.1:9/x.png"><script>console.log("seen")</script>', encoding="utf-8")
        done, requests = _open(page, "--dump-dom")
    if requests != ["http://127.0.0.1:9/x.png"] or "CONSOLE" not in done.stderr:
        raise SystemExit(f"the control page was not caught: requests {requests}, console {'CONSOLE' in done.stderr}")


def _events(text: str) -> list[dict]:
    """The log's events, also where the browser ended before it closed the list."""
    try:
        return json.loads(text)["events"]
    except ValueError:
        return json.loads(text.rstrip().rstrip(",") + "]}")["events"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("pages", nargs="+", type=Path)
    options.add_argument("--out", type=Path, default=Path())
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    control()
    bad = False
    for page in given.pages:
        found = look(page, (given.out / f"{page.parent.name}-{page.stem}.png").absolute())
        wrong = [
            *(["it writes to the console"] if found["console"] else []), *(["it asks for other files"] if found["requests"] else []),
            *(["3 MB or more"] if found["bytes"] >= LIMIT else []), *(["no text, or a script"] if found["words"] < 100 or found["scripts"] else []),
            *(["no screenshot"] if not found["screenshot"] else []),
        ]  # fmt: skip
        bad = bad or bool(wrong)
        print(json.dumps({**found, "wrong": wrong}, indent=1))
    raise SystemExit(int(bad))


if __name__ == "__main__":
    main()
