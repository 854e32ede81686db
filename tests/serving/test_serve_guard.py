"""Proves that the server refuses unauthorised clients and malformed requests.

Each refusal is one of OpenAI's errors, and after each the server answers the next request as usual.
"""

import hmac
import json
import socket
from contextlib import closing
from importlib import import_module

import openai
import pytest

import minilora as ml
from helpers import served
from helpers.served import HEAD, NAMES, SHORT, build, endless, error, http, tokenizer
from minilora.cli.main import main
from minilora.serving import middleware
from minilora.serving.config import ServeConfig
from minilora.serving.serve import base_name

JSON = {"content-type": "application/json"}
model, url = served.model, served.url


@pytest.fixture(scope="module")
def server(model):
    with endless(model, max_body=2000) as server:
        yield server


# ---- access


def test_serve_names_the_adapters_that_cannot_share_a_batch(monkeypatch, capsys):
    model = build(adapters=1)
    for name in ("dora", "rescaled"):
        ml.inject(model, ml.LoRAConfig(target_modules=["q_proj"], use_dora=True), name=name)
    monkeypatch.setattr("minilora.serving.server.run", lambda engine, *given: engine.close())
    monkeypatch.delenv("MINILORA_API_KEY", raising=False)
    ml.serve(model, tokenizer())
    said = capsys.readouterr().err
    assert f"minilora serves base, {NAMES[0]}, dora, rescaled" in said
    assert "minilora serves dora, rescaled one at a time: adapters with more than linear" in said


def test_requests_without_the_token_are_refused(model, monkeypatch):
    compared = []
    same = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or same(a, b))
    with endless(model, token="s3cret-s3cret") as server:
        for headers in (
            {},
            {"authorization": "Bearer s3cret"},
            {"authorization": "Basic s3cret-s3cret"},
        ):
            for method, path in [
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/x"),
            ]:
                refused = http.request(method, f"{server.url}{path}", headers=headers)
                assert refused.status_code == 401 and error(refused)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            assert (
                http.post(f"{server.url}/v1/completions", json=SHORT, headers=headers).status_code
                == 401
            )
        # hashes are compared, so the time does not depend on the length of the token
        assert compared and all(len(a) == len(b) == 32 for a, b in compared)
        for path in ("/", "/health", "/healthz"):
            assert (
                http.get(f"{server.url}{path}", headers={"host": "proxy.example"}).status_code
                == 200
            )
            assert http.post(f"{server.url}{path}", json={}).status_code == 401
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="s3cret-s3cret", max_retries=0
        ) as client:
            assert client.completions.create(**SHORT).choices[0].text
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_other_host_names_and_content_types_are_refused(server, url):
    """In DNS rebinding the name of a foreign page leads to this machine.

    The other content types are those that the forms of such a page could send.
    """
    for host in ("evil.example", "evil.example:80", ""):
        refused = http.post(url, json=SHORT, headers={"host": host})
        assert refused.status_code == 403 and error(refused)["code"] == "wrong_host"
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000"):
        assert http.post(url, json=SHORT, headers={"host": host}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = http.post(url, content=json.dumps(SHORT), headers={"content-type": kind})
        assert refused.status_code == 415 and "application/json" in error(refused)["message"]


def test_a_route_that_does_not_exist_is_refused_with_those_that_do(server):
    for method, path, status in [
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/chat/completions", 405),
    ]:
        refused = http.request(method, f"{server.url}{path}", headers=JSON)
        message = error(refused)["message"]
        assert refused.status_code == status
        assert message.startswith(f"{method} {path} is not served here.")
        assert "POST /v1/chat/completions, POST /v1/completions, POST /generate" in message


def test_only_pages_of_allowed_origins_may_read_answers(model, server, url):
    origin = "https://app.example"
    asks = {"origin": origin, "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    assert http.request("OPTIONS", url, headers=asks).status_code == 405
    assert "access-control-allow-origin" not in http.post(url, json=SHORT, headers=asks).headers
    options = {"cors_origins": f"{origin}, https://b.example"}
    with endless(model, token="s3cret-s3cret", **options) as open_server:
        route = f"{open_server.url}/v1/completions"
        allowed = http.request("OPTIONS", route, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        for token, status in (("s3cret-s3cret", 200), ("wrong", 401)):
            headers = {"origin": origin, "authorization": f"Bearer {token}"}
            answer = http.post(route, json=SHORT, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin
        foreign = http.request("OPTIONS", route, headers=asks | {"origin": "https://c.example"})
        assert foreign.status_code == 400
        assert "access-control-allow-origin" not in foreign.headers


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        (
            {"host": "0.0.0.0"},
            {},
            "host 0.0.0.0: other machines could send requests without a token. "
            "Set MINILORA_API_KEY",
        ),
        ({"host": "example.org"}, {}, "other machines could send requests"),
        ({}, {"MINILORA_API_KEY": ""}, "MINILORA_API_KEY has 0 characters: expected 8 or more"),
        ({}, {"MINILORA_API_KEY": " short "}, "has 5 characters"),
        ({"adapter_folder": "nowhere"}, {}, "adapter_folder: nowhere is not a folder"),
        ({"port": 70000}, {}, "port: expected >= 0 and <= 65535"),
        ({"timeout": 0.0}, {}, "timeout: expected > 0"),
        ({"cors_origins": "app.example"}, {}, "cors_origins: expected origins such as https"),
        ({"cors_origins": "https://a.example/"}, {}, "cors_origins: expected origins such as"),
    ],
)
def test_a_server_with_an_unsafe_or_invalid_config_does_not_start(
    model, monkeypatch, capsys, given, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ml.serve(model, tokenizer(), config=ServeConfig(**given))
    options = [f"--{name}={value}" for name, value in given.items()]
    assert (
        main(["serve", "./nowhere", *options]) == 1
        and message.split(":")[0] in capsys.readouterr().err
    )


def test_missing_packages_and_adapter_paths_are_named(model, monkeypatch, capsys):
    monkeypatch.setattr(import_module("minilora.common.extras"), "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fastapi and uvicorn, .* pip install -e '\.\[serve\]'"):
        ml.serve(model, tokenizer())
    assert (
        main(["serve", "./nowhere"]) == 1 and "pip install -e '.[serve]'" in capsys.readouterr().err
    )
    assert (
        main(["serve", "./nowhere", "--adapter", "a"]) == 1
        and "a: no such folder" in capsys.readouterr().err
    )


def test_names_of_bases_hide_local_paths(tmp_path):
    for source, name in {
        str(tmp_path): tmp_path.name,
        "org/model": "org/model",
        "": "base",
    }.items():
        assert base_name(source) == name


def test_one_name_for_the_base_and_an_adapter_is_refused(model):
    with pytest.raises(ValueError, match="'adapter0' names the base and an adapter"):
        ml.serve(model, tokenizer(), config=ServeConfig(name=NAMES[0]))
    assert not any("forward" in vars(module) for module in model.modules())


# ---- malformed requests


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b"[" * 1900, b'{"a":' * 300),
        *(b'{"model": "base", "prompt": "\\ud800"}', b'{"model": "base\\udfff", "prompt": "a"}'),
        *(
            b'{"model": "base", "prompt": "a", "temperature": NaN}',
            b'{"model":"base","prompt":"a","seed":1e999}',
        ),
        *(
            b'{"model": "base", "prompt": "a", "seed": ' + b"9" * 1900 + b"}",
            b'{"model": "base", "prompt": [1.5]}',
        ),
        *(
            b'{"model": "base", "prompt": [true]}',
            b'{"model": "base", "prompt": "a", "\\u0000": 1}',
        ),
    ],
)
def test_a_malformed_body_is_refused_with_400_or_404(url, body):
    refused = http.post(url, content=body, headers=JSON)
    assert refused.status_code in (400, 404) and error(refused)["message"]


def test_other_methods_and_paths_are_refused(server, url):
    assert error(http.get(url))["message"].startswith("GET /v1/completions is not served here.")
    assert error(http.get(f"{server.url}/v2"))["type"] == "not_found_error"
    assert error(http.get(f"{server.url}/v1/models/none"))["code"] == "model_not_found"


def test_large_and_slow_bodies_are_refused(server, url, monkeypatch):
    fits = json.dumps(SHORT).encode()
    for size, status in ((2000, 200), (2001, 413)):
        body = fits + b" " * (size - len(fits))
        for content in (body, iter([body[:50], body[50:]])):  # with its length, and in chunks
            answer = http.post(url, content=content, headers=JSON)
            assert answer.status_code == status
            assert status == 200 or error(answer)["code"] == "too_large"
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    # a body with too large a declared length is refused without waiting
    for size, status in ((100, b" 408 "), (2001, b" 413 ")):
        with closing(
            socket.create_connection(server.servers[0].sockets[0].getsockname())
        ) as stalls:
            stalls.sendall(f"{HEAD}Content-Length: {size}\r\n\r\n{{".encode())
            assert status in stalls.recv(1000).split(b"\r\n")[0]


@pytest.fixture
def folders(tmp_path, model):
    """Make an allowed folder with an adapter and links out of it, and folders outside of it."""
    allowed = tmp_path / "allowed"
    ml.save_adapter(model, allowed / "inside", name=NAMES[0])
    ml.save_adapter(model, tmp_path / "outside", name=NAMES[0])
    (allowed / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "empty").mkdir()
    (allowed / "void").symlink_to(tmp_path / "empty")
    (allowed / "hollow").mkdir()
    for file in (tmp_path / "outside").iterdir():
        (allowed / "hollow" / file.name).symlink_to(file)
    (allowed / "good_link").symlink_to(allowed / "inside")
    (allowed / "file").write_text("{}")
    return allowed


def test_adapters_come_from_the_allowed_folder_alone(model, folders):
    outside = [
        f"{folders.parent}/outside",
        "../outside",
        "inside/../../outside",
        "link",
        "hollow",
        "void",
    ]
    nowhere = ["", "missing", "file", "a" * 5000, "a\0b", "~", "org/repository", "/"]
    with endless(build(adapters=0), adapter_folder=str(folders)) as server:
        for path in outside + nowhere:
            refused = http.post(
                f"{server.url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": path}
            )
            assert refused.status_code == 400
            message = f"lora_path: {path!r} is not an adapter folder inside the server's folder."
            assert not path or error(refused)["message"] == message
        for name in ("", "a.b", "../a", "a" * 65, "keys"):
            refused = http.post(
                f"{server.url}/v1/load_lora_adapter",
                json={"lora_name": name, "lora_path": "inside"},
            )
            assert refused.status_code == 400, name
        for name, path in {
            "one": "inside",
            "two": "good_link",
            "three": f"{folders}/inside",
        }.items():
            answer = http.post(
                f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}
            )
            assert answer.status_code == 200, answer.text
        assert server.worker.engine.adapters == ["one", "two", "three"]


def test_without_an_allowed_folder_nothing_is_loaded(server, url):
    refused = http.post(
        f"{server.url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}
    )
    assert refused.status_code == 403 and "--adapter_folder" in error(refused)["message"]
