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
from urllib.parse import urlsplit

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
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.html"
        empty.write_text("<!DOCTYPE html><title>empty</title>", encoding="utf-8")
        own = {urlsplit(url).netloc for url in _open(empty, "--dump-dom")[1]}  # what the browser asks for on its own account, whatever the page
    shown, _ = _open(page, "--dump-dom")
    return {
        "page": page.name,
        "bytes": page.stat().st_size,
        "console": re.findall(r"CONSOLE[^\n]*", done.stderr),
        "requests": [url for url in requests if urlsplit(url).netloc not in own],
        "scripts": shown.stdout.count("<script"),
        "words": len(re.sub(r"(?s:<style.*?</style>)|<[^>]+>", " ", shown.stdout).split()),
        "screenshot": str(shot) if shot.is_file() else None,
    }


def _open(page: Path, *more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """(the browser's output, the addresses that were asked for beside the page's own)."""
    address = page.absolute().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        command = [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--log-net-log={log}", *more, address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        events = _events(log.read_text(encoding="utf-8")) if log.is_file() else []
    found = {url for event in events if (url := (event.get("params") or {}).get("url"))}
    return done, sorted(url for url in found if url != address and not url.startswith(("chrome", "devtools", "data:", "about:")))


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
