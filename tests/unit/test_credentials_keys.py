"""API keys: scopes, expiry, and the keys of a process while their store is unavailable."""

import pytest
from pydantic import ValidationError

from infra.credentials.api_keys import ID_BYTES, SECRET_BYTES, Token, issue, revoked, rotated, valid_until_ms
from infra.credentials.key_table import RECHECK_S, KeyTable
from infra.credentials.memory_keys import MemoryKeys
from infra.credentials.port import CredentialRefused, CredentialsUnavailable
from schemas.credentials import Scope
from schemas.search import Access

HOUR_MS = 3_600_000.0


def issued(seed=1, *, now_ms=0.0, expires_ms=None, scopes=(Scope.QUERY,), tenant="acme", groups=("staff",)):
    random = bytes([seed]) * (ID_BYTES + SECRET_BYTES)
    return issue(
        random, label="page", tenant=tenant, groups=groups, scopes=scopes, now_ms=now_ms, expires_ms=expires_ms
    )


def test_a_token_reads_back_and_its_secret_is_kept_nowhere():
    key, token = issued()
    assert Token.parse(str(token)) == token
    assert token.secret not in key.model_dump_json()
    assert token.secret not in repr(token)
    assert valid_until_ms(key, token.secret, now_ms=1e15) == float("inf")


def test_groups_of_a_key_are_read_as_those_of_a_document_are():
    key, _ = issued(groups=(" * ", "staff", "", "staff", "Staff"))
    assert key.groups == ("*", "staff", "Staff")
    with pytest.raises(ValidationError, match="every group name is blank"):
        issued(groups=(" ",))


@pytest.mark.parametrize("text", ["", "fl_", "fl_01_02", "fl_" + "0" * 16 + "_" + "0" * 63, "xx_" + "0" * 16, "ä" * 84])
def test_what_is_no_token_is_none(text):
    assert Token.parse(text) is None


def test_another_secret_does_not_open_it():
    key, token = issued()
    assert valid_until_ms(key, token.secret[:-1] + "0", now_ms=1) is None
    assert valid_until_ms(key, key.secrets[0].sha256, now_ms=1) is None


def test_a_key_ends_at_its_time():
    key, token = issued(expires_ms=HOUR_MS)
    assert valid_until_ms(key, token.secret, now_ms=HOUR_MS - 1) == HOUR_MS
    assert valid_until_ms(key, token.secret, now_ms=HOUR_MS) is None


def test_a_rotation_overlaps_and_a_second_one_ends_the_first_secret():
    key, first = issued()
    key, second = rotated(key, b"\2" * SECRET_BYTES, now_ms=0, overlap_ms=HOUR_MS)
    assert valid_until_ms(key, first.secret, now_ms=HOUR_MS - 1) == HOUR_MS
    assert valid_until_ms(key, first.secret, now_ms=HOUR_MS) is None
    assert valid_until_ms(key, second.secret, now_ms=1e15) == float("inf")
    key, third = rotated(key, b"\3" * SECRET_BYTES, now_ms=1, overlap_ms=HOUR_MS)
    opening = [valid_until_ms(key, token.secret, now_ms=2) is not None for token in (first, second, third)]
    assert opening == [False, True, True]


def test_a_revocation_ends_every_secret_and_remains():
    key, first = issued()
    key, second = rotated(key, b"\2" * SECRET_BYTES, now_ms=0, overlap_ms=HOUR_MS)
    ended = revoked(revoked(key, now_ms=5), now_ms=9)
    assert ended.revoked_ms == 5
    assert [valid_until_ms(ended, token.secret, now_ms=6) for token in (first, second)] == [None, None]


class Clock:
    """Monotonic seconds and epoch milliseconds that move together."""

    def __init__(self):
        self.s = 1_000.0

    def monotonic_s(self):
        return self.s

    def now_ms(self):
        return self.s * 1_000


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store():
    return MemoryKeys()


@pytest.fixture
def table(store, clock):
    return KeyTable(store, refresh_s=5, stale_s=60, monotonic_s=clock.monotonic_s, now_ms=clock.now_ms)


async def test_the_table_states_whom_a_token_speaks_for(store, table, clock):
    key, token = issued(scopes=(Scope.QUERY, Scope.INGEST))
    await store.add(key)
    await table.refresh()
    verified = table.verify(token)
    assert verified.principal.subject == f"key:{key.key_id}"
    assert verified.principal.access == Access("acme", ("staff",))
    assert verified.principal.scopes == {Scope.QUERY, Scope.INGEST}
    assert verified.until_s == clock.s + RECHECK_S
    with pytest.raises(CredentialRefused):
        table.verify(Token(token.key_id, "0" * 64))
    with pytest.raises(CredentialRefused):
        table.verify(Token("0" * 16, token.secret))


async def test_a_verification_ends_with_the_key(store, table, clock):
    key, token = issued(expires_ms=clock.now_ms() + 300)
    await store.add(key)
    await table.refresh()
    assert table.verify(token).until_s == pytest.approx(clock.s + 0.3)


async def test_a_revocation_is_known_with_the_next_reading(store, table):
    key, token = issued()
    await store.add(key)
    await table.refresh()
    await store.change(key.key_id, lambda key: revoked(key, now_ms=1))
    table.verify(token)
    await table.refresh()
    with pytest.raises(CredentialRefused):
        table.verify(token)


async def test_the_last_table_continues_on_for_a_while_and_no_longer(store, table, clock):
    key, token = issued()
    await store.add(key)
    await table.refresh()
    store.available = False
    clock.s += 59.5
    await table.refresh()
    assert table.verify(token).until_s == pytest.approx(clock.s + 0.5)
    clock.s += 0.5
    with pytest.raises(CredentialsUnavailable):
        table.verify(token)
    store.available = True
    await table.refresh()
    table.verify(token)


async def test_before_the_first_reading_no_caller_is_let_in_or_rejected(store, table):
    key, token = issued()
    await store.add(key)
    store.available = False
    await table.refresh()
    with pytest.raises(CredentialsUnavailable):
        table.verify(token)
