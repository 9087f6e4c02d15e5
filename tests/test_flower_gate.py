"""The server's door, its keys and secrets, and the policy's file."""

from __future__ import annotations

import base64
import datetime
import http.server
import stat
import threading

import pytest

pytest.importorskip("flwr")

import httpx  # noqa: E402

from fedllm.cli import main  # noqa: E402
from fedllm.errors import FedError  # noqa: E402
from fedllm.fleets.flower import gate, keys, policy  # noqa: E402
from fedllm.fleets.flower.gate import Gate, free_port  # noqa: E402


@pytest.fixture
def behind():
    """A server that answers every request with its path, and keeps what it was asked."""
    asked = []

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


def test_the_gate_passes_what_nodes_need_and_nothing_else(behind):
    port, asked = behind
    own = free_port()
    with Gate("127.0.0.1", own, f"http://127.0.0.1:{port}"):
        at = f"http://127.0.0.1:{own}"
        assert httpx.post(f"{at}/v1/fleet/pull-messages", content=b"x" * 1000).content == b"ok"
        for path in (
            "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/openapi.json",
            "/health", "/", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/V1/fleet/x",
            "//v1/fleet/x",
        ):  # fmt: skip
            raw = httpx.Request("POST", at)
            raw.url = raw.url.copy_with(raw_path=path.encode())
            with httpx.Client() as client:
                assert client.send(raw).status_code == 403, path
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            assert httpx.request(method, f"{at}/v1/fleet/pull-messages").status_code == 403
        assert httpx.post(f"{at}/v1/fleet/push-object", content=bytes(gate.MOST + 1)).status_code == 413
    assert asked == [("/v1/fleet/pull-messages", b"x" * 1000)]


def test_the_gate_knows_the_keys(behind):
    port, asked = behind
    own = free_port()
    with Gate("127.0.0.1", own, f"http://127.0.0.1:{port}", known=lambda: {b"ours": "a"}):
        at = f"http://127.0.0.1:{own}"
        for key, code in ((b"ours", 200), (b"other", 401)):
            headers = {gate.KEY_HEADER: base64.b64encode(key).decode()}
            assert httpx.post(at + gate.ASK, headers=headers).status_code == code
        assert httpx.post(f"{at}/v1/fleet/x").status_code == 401
        assert httpx.post(f"{at}/v1/fleet/x", headers={gate.KEY_HEADER: "%%%"}).status_code == 401
    assert asked == []


def test_a_gate_whose_superlink_is_away_says_so():
    own = free_port()
    with Gate("127.0.0.1", own, f"http://127.0.0.1:{free_port()}"):
        assert httpx.post(f"http://127.0.0.1:{own}/v1/fleet/x").status_code == 503


def test_what_is_secret_is_its_owners_alone(tmp_path, capsys):
    assert main(["serve", "init", str(tmp_path / "deploy"), "--host", "fed.example.org"]) == 0
    assert main(["join", "init", str(tmp_path / "site"), "--client", "hospital_a"]) == 0
    for name in ("deploy/server.key", "deploy/link.secret", "deploy/ca/ca.key", "site/node", "site/node.secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    printed = capsys.readouterr().out
    assert "ecdsa-sha2-nistp384" in printed and "PRIVATE" not in printed
    (tmp_path / "site" / "node").chmod(0o644)
    with pytest.raises(FedError, match=r"can be read by others \(mode 0644\): chmod 600"):
        keys.read_secret(tmp_path / "site" / "node")


def test_the_certificate_is_for_its_host_and_loopback(tmp_path):
    from cryptography import x509

    keys.create_server(tmp_path / "d", "fed.example.org", 9443, False)
    made = x509.load_pem_x509_certificate((tmp_path / "d" / "server.crt").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    authority = x509.load_pem_x509_certificate((tmp_path / "d" / "ca.crt").read_bytes())
    made.verify_directly_issued_by(authority)
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_plain_http_is_for_loopback(tmp_path, capsys):
    assert main(["serve", "init", str(tmp_path / "d"), "--host", "fed.example.org", "--insecure"]) == 2
    assert "--insecure with --host fed.example.org" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    keys.create_server(tmp_path / "d", "127.0.0.1", 9443, True)
    page = (tmp_path / "d" / "clients.yaml").read_text().replace("127.0.0.1", "10.0.0.1")
    (tmp_path / "d" / "clients.yaml").write_text(page)
    with pytest.raises(FedError, match="insecure is for 127.0.0.1 alone, and host is 10.0.0.1"):
        keys.load_server(tmp_path / "d")
    assert main(["join", "init", str(tmp_path / "s"), "--client", "a", "--server", "10.0.0.1:9443", "--insecure"]) == 0
    assert main(["join", str(tmp_path / "s")]) == 2
    assert "without TLS it is for 127.0.0.1 alone" in capsys.readouterr().err


def test_a_key_belongs_to_one_client(tmp_path):
    keys.create_server(tmp_path / "d", "127.0.0.1", 9443, False)
    keys.create_node(tmp_path / "a", "a", "")
    keys.allow(tmp_path / "d", "a", tmp_path / "a" / "node.pub", 100, None)
    with pytest.raises(FedError, match="client a has this key already"):
        keys.allow(tmp_path / "d", "b", tmp_path / "a" / "node.pub", None, None)
    with pytest.raises(FedError, match="client A and client a differ in case alone"):
        keys.allow(tmp_path / "d", "A", tmp_path / "a" / "node.pub", None, None)
    with pytest.raises(FedError, match="client c needs its node's public key"):
        keys.allow(tmp_path / "d", "c", None, None, None)
    (tmp_path / "rsa.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJTbPTTDbvFyMdC2bRzgmLYVOPPvoeNNxmcAUEDPuj0Y x"
    )
    with pytest.raises(FedError, match="keys on an elliptic curve"):
        keys.allow(tmp_path / "d", "c", tmp_path / "rsa.pub", None, None)
    server = keys.load_server(tmp_path / "d")
    assert server.clients["a"].most_rows == 100
    assert set(keys.clients_by_key(server.clients).values()) == {"a"}


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "a\\b", "é", "a b", "-rf", "x" * 65, "a\n"])
def test_a_clients_id_is_a_folders_name(id):
    with pytest.raises(FedError, match="client id"):
        keys.check_id(id)


POLICY = {
    "client": "a",
    "rank": 8,
    "data": {"name": "own", "path": "rows.jsonl"},
    "models": ["pico"],
    "rules": ["fedhl"],
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rang": 8}, "rang is not a key of a recipe. Did you mean rank?"),
        ({"rank": -1}, "rank=-1: give a whole number from 0 up"),
        ({"data": {}}, "data.name is missing"),
        ({"most": {"bytes_up": "lots"}}, "'lots': give a number of bytes, such as 200MB"),
        ({"most": {"hours_from": "20:00"}}, "most.hours_from and most.hours_to: give both"),
        ({"most": {"hours_from": "25:00", "hours_to": "6:00"}}, "'25:00' is no time of the day"),
        ({"ask": "maybe"}, "ask='maybe': give 'first', 'always' or 'never'"),
        ({"client": "../x"}, "client id '../x'"),
        ({"privacy": {"unit": "row"}}, "privacy.unit='row'"),
    ],
)
def test_a_policy_is_read_strictly(changes, words, tmp_path):
    import yaml

    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(POLICY | changes))
    with pytest.raises(FedError) as error:
        policy.load(tmp_path / "policy.yaml")
    assert words in str(error.value)


def own(**changes) -> policy.Policy:
    return policy.Policy(**{**POLICY, "models": ("pico", "m@abc"), "rules": ("fedhl",), **changes})


PAGE = {"algorithm": {"name": "fedhl"}, "model": {"name": "pico"}, "run": {"rounds": 2}, "data": {"name": "gsm8k"}}


def test_templates_come_from_the_server_only_where_the_policy_says_so():
    """A template decides which columns reach the model."""
    page = PAGE | {"data": {"name": "own", "prompt_template": "{ssn}", "path": "/etc", "score": "x.py:f"}}
    assert policy.node_page(own(), page)["data"] == {"name": "own", "clients": {"a": "rows.jsonl"}}
    taken = policy.node_page(own(templates="server"), page)["data"]
    assert taken == {"name": "own", "clients": {"a": "rows.jsonl"}, "prompt_template": "{ssn}"}


def test_a_revision_is_listed_with_its_model():
    asked = PAGE | {"model": {"name": "m", "revision": "abc"}}
    assert policy.node_page(own(), asked)["model"] == {"name": "m", "revision": "abc"}
    for model in ({"name": "m"}, {"name": "m", "revision": "main"}, {"name": "pico", "config": {"a": 1}}):
        with pytest.raises(policy.Refused):
            policy.node_page(own(), PAGE | {"model": model})


def test_privacy_is_taken_or_refused_never_ignored():
    demand = own(privacy=policy.Demand("example", 8.0))
    with pytest.raises(policy.Refused, match="privacy.unit=none"):
        policy.node_page(demand, PAGE)
    with pytest.raises(policy.Refused, match="at most"):
        policy.node_page(demand, PAGE | {"privacy": {"unit": "example", "epsilon": float("nan")}})
    private = {"unit": "example", "epsilon": 4}
    assert policy.node_page(demand, PAGE | {"privacy": private})["privacy"] == private
    assert policy.node_page(own(), PAGE | {"privacy": private, "local": {"x": 1}})["local"] == {"x": 1}


@pytest.mark.parametrize("at, inside", [("21:00", True), ("03:00", True), ("06:00", False), ("12:00", False)])
def test_hours_may_go_over_midnight(at, inside):
    night = own(most=policy.Most(hours_from="20:00", hours_to="06:00"))
    now = datetime.datetime.fromisoformat(f"2026-11-26T{at}")
    if inside:
        policy.check_hours(night, now)
    else:
        with pytest.raises(policy.Refused, match="it trains from 20:00 to 06:00"):
            policy.check_hours(night, now)


@pytest.mark.parametrize("text, count", [("200MB", 200_000_000), ("1 GB", 10**9), (77, 77), ("5k", 5000)])
def test_bytes_are_read_as_written(text, count):
    assert policy.count_bytes(text) == count
