"""Tokens a second of a server: all clients at a time against one by one, with transformers serve.

    python benchmarks/inference/bench_serve.py [--clients 8] [--new 64] [--rounds 3]
        [--dtype auto] [--quantize nf4]

Each of --clients requests is a chat of another length, answered greedily with --new tokens. The
requests are sent one by one, then all at a time. The servers take turns:

    base              every client uses the base model
    adapters          every client uses another adapter, in the same batch
    transformers      `transformers serve` (with --continuous-batching if it has it), the base model

Each server runs in a separate process with its default number of threads, and sleeps while another
server works. Its memory is the peak of resident memory. All compute in bf16, or in fp32 on a CPU
without it. The script checks that an answer begins with the same characters in both ways. The last
line is one JSON document.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import (
    add_dtype,
    compute_dtype,
    dtype_name,
    machine,
    memory,
    missing_peers,
    small_chat_model,
    spread,
)

# The first characters that both ways must share. Later ones may differ where two tokens are almost
# equally likely.
SAME = 4
STARTS = 180  # seconds for a server to start and answer
SHARE = 0.05  # share of free memory for the cache of transformers serve; its default is 0.6
Request = dict[str, Any]
Server = tuple[str, int]  # address, process id
# One client for all requests: creating a client takes as long as a token.
CLIENT = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    add_dtype(parser)
    parser.add_argument(
        "--quantize",
        choices=["nf4"],
        help="load the base model in 4 bits; transformers stays dense",
    )
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, one short round"
    )
    options = parser.parse_args()
    if options.short:
        options.clients, options.new, options.rounds = 3, 8, 1
    dtype = compute_dtype(options.dtype)
    options.dtype = dtype_name(dtype)
    found: dict[str, Any] = {"benchmark": "bench_serve", **machine(dtype)}
    found |= {"clients": options.clients, "new": options.new}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        adapters = write(folder, options)
        server = stack.enter_context(ours(folder, adapters, options))
        sides = {"base": (server, ["base"] * options.clients), "adapters": (server, adapters)}
        missing = missing_peers("transformers", "fastapi", "uvicorn")
        if missing:
            print(f"minilora alone: {missing}")
        else:
            peer = stack.enter_context(theirs(folder, options))
            if peer is not None:
                sides["transformers"] = peer, [str(folder / "model")] * options.clients
        found["sides"] = {side: [] for side in sides}
        for number in range(options.rounds + 1):  # the first round is not counted
            for side, ((url, process), models) in sides.items():
                figures = turn(url, models, options)
                figures["megabytes"] = memory(process).get("VmHWM", 0) / 1e6
                if number:
                    found["sides"][side].append(figures)
    print(json.dumps(found | {"sides": table(found["sides"])}))


def write(folder: Path, options: argparse.Namespace) -> list[str]:
    """Write a model with its tokenizer and an adapter for each client; return the adapters' names.

    Each adapter has a random B, as if it were trained.
    """
    if options.short:
        small_chat_model(folder / "model", getattr(torch, options.dtype))
        model = ml.load_model(folder / "model", dtype=options.dtype)
    else:
        source = ml.samples.smollm2()
        model, tokenizer = ml.load_model(source, dtype=options.dtype), ml.load_tokenizer(source)
        ml.save_model(model, folder / "model", tokenizer=tokenizer)
    names = [f"adapter{number}" for number in range(options.clients)]
    for seed, name in enumerate(names):
        ml.inject(model, ml.LoRAConfig(r=8, target_modules="all-linear"), name=name, seed=seed)
        for key, tensor in ml.adapter_state_dict(model, name).items():
            if "lora_B" in key:
                tensor.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        ml.save_adapter(model, folder / name, name=name)
        ml.eject(model)
    return names


@contextmanager
def process(command: list[str], url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server during the context, from its first answer or after STARTS seconds."""
    with log.open("wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            end = time.monotonic() + STARTS
            while started.poll() is None and time.monotonic() < end:
                try:
                    httpx.get(f"{url}/v1/models")
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield started
        finally:
            started.terminate()
            started.wait()


@contextmanager
def ours(folder: Path, adapters: list[str], options: argparse.Namespace) -> Iterator[Server]:
    """Run `minilora serve` with all adapters."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "minilora",
        "serve",
        str(folder / "model"),
        "--name=base",
        f"--port={port}",
    ]
    command += [f"--adapter={name}={folder / name}" for name in adapters]
    command += [f"--dtype={options.dtype}", f"--batch_size={options.clients}", "--timeout=600"]
    command += ["--quantize=nf4"] if options.quantize else []
    url = f"http://127.0.0.1:{port}"
    with process(command, url, folder / "minilora.log") as started:
        if started.poll() is not None:
            raise SystemExit((folder / "minilora.log").read_text())
        yield url, started.pid


@contextmanager
def theirs(folder: Path, options: argparse.Namespace) -> Iterator[Server | None]:
    """Run `transformers serve`; yield None and print the reason if it does not answer."""
    port = free_port()
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        str(folder / "model"),
        f"--port={port}",
        f"--dtype={options.dtype}",
    ]
    command += ["--device=cpu", "--continuous-batching", f"--cb-max-memory-percent={SHARE}"]
    url, log = f"http://127.0.0.1:{port}", folder / "transformers.log"
    with process(command, url, log) as started:
        try:
            answer = ask(url, requests([str(folder / "model")], options)[0])
        except (httpx.HTTPError, KeyError, ValueError) as error:
            lines = log.read_text(errors="replace").splitlines()
            last = [line for line in lines if line.strip()][-1:]
            print("transformers serve does not answer here ", end="")
            print(f"({type(error).__name__}: {error}): {last}")
            yield None
            return
        print(f"transformers serve answers: {answer[0][:60]!r}, status {started.poll()}")
        yield url, started.pid


def free_port() -> int:
    """Return a port that no process uses now."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def requests(models: list[str], options: argparse.Namespace) -> list[Request]:
    """Return a chat for each client, all of different lengths."""
    topics = ["a river", "iron", "the moon", "bread", "a violin", "winter", "glass", "an island"]
    made = []
    for number, model in enumerate(models):
        text = f"Tell me about {topics[number % len(topics)]}. " + "Be precise. " * number
        sampling = {"max_tokens": options.new, "temperature": 0.0}
        made.append({"model": model, "messages": [{"role": "user", "content": text}], **sampling})
    return made


def ask(url: str, request: Request) -> tuple[str, int]:
    """Return an answer and its number of tokens."""
    answer = CLIENT.post(f"{url}/v1/chat/completions", json=request).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def turn(url: str, models: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Return tokens a second, one by one and all at a time."""
    made = requests(models, options)
    rates: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    with ThreadPoolExecutor(len(made)) as pool:
        for way, run in {"alone": map, "together": pool.map}.items():
            begun = time.perf_counter()
            answers = list(run(lambda request: ask(url, request), made))
            rates[way] = sum(tokens for _, tokens in answers) / (time.perf_counter() - begun)
            texts[way] = [text for text, _ in answers]
    for alone, together in zip(texts["alone"], texts["together"], strict=True):
        if alone[:SAME] != together[:SAME]:
            raise SystemExit(
                f"{url}: an answer depends on the other requests: {alone!r}, {together!r}"
            )
    return rates | {"ratio": rates["together"] / rates["alone"]}


def table(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print the table and return the figures of the document."""
    print(f"{'tokens/s':<16}{'one by one':>12}{'together':>12}{'ratio (min-max)':>20}", end="")
    print(f"{'/ transformers':>16}{'MB':>8}")
    peers = found.get("transformers")
    rows: dict[str, Any] = {}
    for side, turns in found.items():
        row: dict[str, Any] = {}
        for key in turns[0]:
            row[key] = spread([figures[key] for figures in turns])
        compared = ""
        if peers is not None and side != "transformers":
            pairs = zip(turns, peers, strict=True)
            over = spread([own["together"] / other["together"] for own, other in pairs])
            row["over_transformers"] = over
            compared = f"{over['median']:.2f}"
        ratio = row["ratio"]
        span = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        print(
            f"{side:<16}{row['alone']['median']:>12.1f}{row['together']['median']:>12.1f}", end=""
        )
        print(f"{span:>20}{compared:>16}{row['megabytes']['median']:>8.0f}")
        rows[side] = row
    return rows


if __name__ == "__main__":
    main()
