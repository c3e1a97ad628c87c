"""Signed tokens, with an issuer's key set served over a real connection."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, RSAKey

from infra.credentials.issuer_keys import REFRESH_S, STALE_S, UNKNOWN_KEY_S, IssuerKeys
from infra.credentials.port import CredentialRefused, CredentialsUnavailable
from infra.credentials.tokens import RECHECK_S, TokenVerifier
from infra.settings import JwtSettings
from schemas.credentials import Scope
from schemas.search import Access

NOW_S = 1_800_000_000.0
KEYS = {kid: RSAKey.generate_key(2_048, {"kid": kid}, private=True) for kid in ("one", "two")}


@dataclass
class Issuer:
    url: str = ""
    status: int = 200
    documents: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    clock_s: float = 100.0

    def publish(self, *keys) -> None:
        self.documents["/jwks"] = KeySet(list(keys)).as_dict(private=False)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked.append(self.path)
            body = json.dumps(issuer.documents.get(self.path)).encode()
            self.send_response(issuer.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        issuer.url = f"http://127.0.0.1:{server.server_port}"
        issuer.documents["/.well-known/openid-configuration"] = {
            "issuer": issuer.url,
            "jwks_uri": f"{issuer.url}/jwks",
        }
        issuer.publish(KEYS["one"])
        yield issuer
        server.shutdown()
        thread.join()


@pytest.fixture
async def verifier(issuer):
    settings = JwtSettings(issuer=issuer.url, audience="freshline")
    keys = IssuerKeys(issuer.url, monotonic_s=lambda: issuer.clock_s)
    verifier = TokenVerifier(keys, settings, monotonic_s=lambda: issuer.clock_s, now_s=lambda: NOW_S)
    yield verifier
    await verifier.close()


def token(issuer, key=KEYS["one"], *, algorithm="RS256", **claims) -> str:
    reported = {
        "iss": issuer.url,
        "aud": "freshline",
        "sub": "ada",
        "exp": NOW_S + 3_600,
        "tenant": "acme",
        "groups": ["staff", "board"],
        "scope": "openid query ingest",
    } | claims
    present = {name: value for name, value in reported.items() if value is not None}
    return jwt.encode({"alg": algorithm, "kid": key.kid}, present, key, algorithms=[algorithm])


async def test_a_token_states_who_asks(issuer, verifier):
    verified = await verifier.verify(token(issuer))
    assert verified.principal.subject == "token:ada"
    assert verified.principal.access == Access("acme", ("staff", "board"))
    assert verified.principal.scopes == {Scope.QUERY, Scope.INGEST}
    assert verified.until_s == issuer.clock_s + RECHECK_S


async def test_groups_of_a_token_are_read_as_those_of_a_document_are(issuer, verifier):
    verified = await verifier.verify(token(issuer, groups=[" * ", "staff", "", "staff", "Staff"]))
    assert verified.principal.access.groups == ("*", "staff", "Staff")


async def test_a_verification_ends_with_the_token(issuer, verifier):
    verified = await verifier.verify(token(issuer, exp=NOW_S + 5))
    assert verified.until_s == issuer.clock_s + 5 + 30


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://other.example"},
        {"iss": None},
        {"aud": "another-service"},
        {"aud": None},
        {"exp": NOW_S - 31},
        {"exp": None},
        {"nbf": NOW_S + 60},
        {"sub": None},
        {"tenant": None},
        {"tenant": "UPPER/../x"},
        {"tenant": ["acme"]},
        {"groups": "board"},
        {"groups": ["a,b"]},
        {"groups": [" ", ""]},
        {"groups": [f"g{number}" for number in range(65)]},
    ],
)
async def test_a_token_that_lacks_what_it_must_have_is_refused(issuer, verifier, claims):
    with pytest.raises(CredentialRefused):
        await verifier.verify(token(issuer, **claims))


async def test_without_our_scopes_it_may_do_nothing(issuer, verifier):
    for scope in (None, "openid profile", ["query"]):
        assert (await verifier.verify(token(issuer, scope=scope))).principal.scopes == frozenset()


async def test_the_token_does_not_choose_how_it_is_checked(issuer, verifier):
    elliptic = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
    # What a public key's text would be as a shared secret: the classical confusion.
    shared = OctKey.import_key(json.dumps(issuer.documents["/jwks"]), {"kid": "one"})
    issuer.publish(KEYS["one"], elliptic)
    unsigned = token(issuer).split(".")
    unsigned[0], unsigned[2] = "eyJhbGciOiJub25lIiwia2lkIjoib25lIn0", ""
    for forged in (
        token(issuer, algorithm="RS512"),
        token(issuer, elliptic, algorithm="ES256"),
        token(issuer, shared, algorithm="HS256"),
        ".".join(unsigned),
        token(issuer)[:-8] + "AAAAAAAA",
        "a.b.c",
        "",
    ):
        with pytest.raises(CredentialRefused):
            await verifier.verify(forged)


async def test_keys_are_kept_and_read_again_when_the_issuer_rotates(issuer, verifier):
    for _ in range(3):
        await verifier.verify(token(issuer))
    assert issuer.asked == ["/.well-known/openid-configuration", "/jwks"]
    issuer.publish(KEYS["one"], KEYS["two"])
    issuer.clock_s += UNKNOWN_KEY_S + 1
    await verifier.verify(token(issuer, KEYS["two"]))
    issuer.publish(KEYS["two"])
    issuer.clock_s += REFRESH_S + 1
    with pytest.raises(CredentialRefused):
        await verifier.verify(token(issuer, KEYS["one"]))


async def test_unknown_keys_do_not_make_us_ask_each_time(issuer, verifier):
    await verifier.verify(token(issuer))
    asked = len(issuer.asked)
    for _ in range(5):
        with pytest.raises(CredentialRefused):
            await verifier.verify(token(issuer, KEYS["two"]))
    assert len(issuer.asked) == asked


async def test_an_issuer_that_is_away_is_no_refusal_and_known_keys_go_on(issuer, verifier):
    issuer.status = 500
    with pytest.raises(CredentialsUnavailable):
        await verifier.verify(token(issuer))
    issuer.status, issuer.clock_s = 200, issuer.clock_s + 2
    await verifier.verify(token(issuer))
    issuer.status, issuer.clock_s = 500, issuer.clock_s + STALE_S - 1
    await verifier.verify(token(issuer))
    issuer.clock_s += 2
    with pytest.raises(CredentialsUnavailable):
        await verifier.verify(token(issuer))


@pytest.mark.parametrize("document", [[], {"keys": "x"}, {"issuer": "https://other.example", "jwks_uri": "x"}, None])
async def test_a_wrong_document_is_no_key_set(issuer, verifier, document):
    issuer.documents["/.well-known/openid-configuration"] = document
    with pytest.raises(CredentialsUnavailable):
        await verifier.verify(token(issuer))


@pytest.mark.parametrize("url", ["http://issuer.example", "ftp://127.0.0.1", "issuer.example"])
def test_an_issuer_that_others_can_answer_for_is_not_taken(url):
    with pytest.raises(ValueError, match="https://"):
        IssuerKeys(url)
