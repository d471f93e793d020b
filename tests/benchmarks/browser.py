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


def look(page: Path, shot: Path, *, dark: bool = False) -> dict:
    """Open `page` with the network log on; what was asked for and said."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        common = [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps", "--enable-logging=stderr", "--v=0",
        ]  # fmt: skip
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        address = page.absolute().as_uri()
        picture = [*common, *scheme, f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=1180,5200", address]
        done = subprocess.run(picture, capture_output=True, text=True, timeout=180, check=False)
        plain = [*common, "--blink-settings=scriptEnabled=false", "--dump-dom", address]
        dom = subprocess.run(plain, capture_output=True, text=True, timeout=180, check=False).stdout
        events = _events(log.read_text(encoding="utf-8")) if log.is_file() else []
    requests = sorted({url for event in events if (url := (event.get("params") or {}).get("url")) and url != address and not _own(url)})
    return {
        "page": page.name,
        "bytes": page.stat().st_size,
        "console": re.findall(r"CONSOLE[^\n]*", done.stderr),
        "requests": requests,
        "words without script": len(re.sub(r"<[^>]+>|(?s:<style.*?</style>)", " ", dom).split()),
        "screenshot": str(shot) if shot.is_file() else None,
    }


def _events(text: str) -> list[dict]:
    """The log's events, also where the browser ended before it closed the list."""
    try:
        return json.loads(text)["events"]
    except ValueError:
        return json.loads(text.rstrip().rstrip(",") + "]}")["events"]


def _own(url: str) -> bool:
    """What the browser asks for on its own account, whatever the page."""
    return url.startswith(("chrome", "devtools", "data:", "about:")) or any(
        host in url for host in ("clients2.google.com", "accounts.google.com", "update.googleapis.com", "optimizationguide", "safebrowsing")
    )


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
            *(["3 MB or more"] if found["bytes"] >= LIMIT else []), *(["no text without script"] if found["words without script"] < 100 else []),
            *(["no screenshot"] if not found["screenshot"] else []),
        ]  # fmt: skip
        bad = bad or bool(wrong)
        print(json.dumps({**found, "wrong": wrong}, indent=1))
    raise SystemExit(int(bad))


if __name__ == "__main__":
    main()
