"""F47: certificates that are self-signed, expired, of another host or of an unknown authority, and redirects over TLS.

Real TLS servers on loopback, with certificates of the `openssl` command. What a client refuses never sees its key.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpcore2
import pytest

from tests.search.http_faults import Exchange, FaultServer, good_chat, good_retrieval
from zs_fast.config import RetrieverConfig, SimulatorConfig
from zs_fast.errors import PreflightError
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.types import Question, SearchRequest, SearchResult

KEY = "canary51c7"
QUESTION = Question(id="q", text="x", answers=("y",), source="s")
HERE, ELSEWHERE = "subjectAltName=DNS:localhost,IP:127.0.0.1", "subjectAltName=DNS:other.example"
REFUSED = {
    "self-signed": "self.signed",
    "unknown authority": "unable to get local issuer|self.signed|unknown ca",
    "expired": "expired",
    "other host": "mismatch|not valid for",
}
"""A certificate's fault -> what a client says about it."""


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str, extension: str = "basicConstraints=critical,CA:TRUE") -> None:
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    openssl(folder, "req", "-x509", *new_key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}",
            "-addext", extension)  # fmt: skip


def certificate(folder: Path, name: str, signer: str, names: str, days: str = "2") -> None:
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    openssl(folder, "req", *new_key, "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / "names").write_text(names)
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{signer}.pem", "-CAkey", f"{signer}.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", days, "-extfile", "names")  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("trusted", "unheard of"):
        authority(folder, name)
    authority(folder, "self-signed", HERE)
    certificate(folder, "good", "trusted", HERE)
    certificate(folder, "unknown authority", "unheard of", HERE)
    certificate(folder, "expired", "trusted", HERE, days="-1")
    certificate(folder, "other host", "trusted", ELSEWHERE)
    return folder


@pytest.fixture(autouse=True)
def trusts_one_authority(monkeypatch: pytest.MonkeyPatch, certificates: Path) -> None:
    """As if a machine's store held `trusted`; how certificates are checked stays what it is."""
    real = httpcore2.default_ssl_context

    def with_authority(*arguments: object, **named: object) -> ssl.SSLContext:
        context = real(*arguments, **named)
        context.load_verify_locations(certificates / "trusted.pem")
        return context

    monkeypatch.setattr(httpcore2, "default_ssl_context", with_authority)
    monkeypatch.setenv("ZS_TEST_KEY", KEY)
    monkeypatch.setenv("SER_API_KEY", KEY)


class TlsServer(FaultServer):
    def __init__(self, good: Callable[[bytes], bytes], certificate: Path) -> None:
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, certificate.with_suffix(".key"))
        super().__init__(good)
        self.url = f"https://127.0.0.1:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            super()._serve(self._tls.wrap_socket(connection, server_side=True))


@contextmanager
def tls(good: Callable[[bytes], bytes], certificate: Path) -> Iterator[TlsServer]:
    server = TlsServer(good, certificate)
    try:
        yield server
    finally:
        server.refuse()


def ask_simulator(url: str) -> None:
    OpenAIEngine(SimulatorConfig(kind="openai", url=f"{url}/v1", api_key_env="ZS_TEST_KEY", timeout_s=10.0)).close()


def ask_retriever(url: str) -> None:
    config = RetrieverConfig(url=f"{url}/retrieve", api_key_env="ZS_TEST_KEY", timeout_s=10.0)
    RemoteSearch(config, documents=1).close()


def search_paid(url: str) -> SearchResult:
    """One search of a kind without a probe; the key is a part of its address."""
    search = RemoteSearch(RetrieverConfig(kind="serpapi", url=f"{url}/search", max_retries=0), documents=1)
    search.submit(SearchRequest(step=1, question=QUESTION, sample=0, turn=0, query="emma", noise_probability=0.0))
    results: list[SearchResult] = []
    deadline = time.monotonic() + 30
    while not results and time.monotonic() < deadline:
        results = search.poll()
        time.sleep(0.002)
    search.close()
    return results[0]


CLIENTS = {"simulator": (ask_simulator, good_chat), "retriever": (ask_retriever, good_retrieval)}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_good_certificate_is_accepted_and_the_key_arrives(certificates: Path, client: str) -> None:
    ask, good = CLIENTS[client]
    with tls(good, certificates / "good.pem") as server:
        ask(server.url)
        assert KEY.encode() in server.received


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_bad_certificate_is_refused_before_anything_is_sent(certificates: Path, client: str, fault: str) -> None:
    ask, good = CLIENTS[client]
    with tls(good, certificates / f"{fault}.pem") as server:
        with pytest.raises(PreflightError, match=rf"(?is){server.url}.*certificate.*({REFUSED[fault]})"):
            ask(server.url)
        assert server.received == b""


@pytest.mark.parametrize("fault", REFUSED)
def test_a_paid_search_is_refused_too(certificates: Path, fault: str) -> None:
    with tls(lambda head: b"{}", certificates / f"{fault}.pem") as server:
        result = search_paid(server.url)
        assert result.failed and "certificate" in result.error.lower() and KEY not in result.error
        assert server.received == b""


@pytest.mark.parametrize("client", [*CLIENTS, "paid"])
@pytest.mark.parametrize("status", ["307 Temporary Redirect", "308 Permanent Redirect", "302 Found"])
def test_a_redirect_to_another_host_is_not_followed(certificates: Path, client: str, status: str) -> None:
    def redirect(exchange: Exchange) -> None:
        exchange.reply(b"", status, headers=f"Location: https://localhost:{other.port}/v1\r\n")

    good = certificates / "good.pem"
    with tls(good_chat, good) as other, tls(good_chat, good) as server:
        server.misbehave(redirect)
        if client == "paid":
            assert "not followed" in search_paid(server.url).error
        else:
            with pytest.raises(PreflightError, match=r"redirect.*not followed"):
                CLIENTS[client][0](server.url)
        assert KEY.encode() in server.received and other.received == b"" and other.requests == []
