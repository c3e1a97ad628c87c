"""``keys``: create, list, rotate and revoke API keys."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from freshline.cli.terminal import MISUSED, Data, Json, add_command, err, fail, out, print_json

if TYPE_CHECKING:  # heavy
    from infra.opensearch.keys import OpenSearchKeys
    from infra.settings import Settings
    from schemas.credentials import ApiKey

_DAY_MS: Final = 86_400_000.0
_HOUR_MS: Final = 3_600_000.0

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""API keys: tenant, scopes and groups of each client.

\b
Examples:
  freshline keys create "search page" --tenant acme --scope query
  freshline keys list
""",
)

KeyId = Annotated[str, typer.Argument(help="Id of the key: the sixteen characters after `fl_`.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    for command in (create, list_, rotate, revoke):
        add_command(keys, command, name=command.__name__.rstrip("_"))
    app.add_typer(keys, name="keys")


def create(
    *,
    label: Annotated[str, typer.Argument(help="Label: the holder of the key.")],
    tenant: Annotated[str | None, typer.Option(help="Tenant of the key. Default: the default tenant.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="query, ingest or admin. Repeatable. Default: query.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Group whose documents the key can read. Repeatable.")] = None,
    expires_days: Annotated[float | None, typer.Option(min=0.0, help="Days until it expires. Default: never.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Create a key and print its token. Only its hash is stored, so the token cannot be shown again.

    All processes accept it within a few seconds.

    Examples:
      freshline keys create "search page" --tenant acme --scope query --group staff
      freshline keys create "content team" --tenant acme --scope ingest --expires-days 90 --json
    """
    from infra.credentials.api_keys import ID_BYTES, SECRET_BYTES, issue  # noqa: PLC0415 - heavy
    from schemas.credentials import Scope  # noqa: PLC0415 - as above

    settings, now_ms = _settings(data), time.time() * 1_000
    scopes = [str(member) for member in Scope]
    for name in scope or ():
        if name not in scopes:
            raise fail(f"unknown scope {name!r}: use {', '.join(scopes)}", MISUSED)
    key, token = issue(
        secrets.token_bytes(ID_BYTES + SECRET_BYTES),
        label=label,
        tenant=tenant or settings.tenant.default,
        groups=group or (),
        scopes=[Scope(name) for name in scope or ("query",)],
        now_ms=now_ms,
        expires_ms=None if expires_days is None else now_ms + expires_days * _DAY_MS,
    )

    async def store_key() -> None:
        from infra.opensearch.provision import create_keys_index  # noqa: PLC0415 - heavy

        await create_keys_index(settings)
        async with _opened_store(settings) as store:
            await store.add(key)

    asyncio.run(store_key())
    _show_token(settings, key, str(token), as_json=as_json)


def list_(*, data: Data = None, as_json: Json = False) -> None:
    """List all keys, including revoked ones. Secrets are never shown.

    Examples:
      freshline keys list
      freshline keys list --json
    """

    async def read() -> "Sequence[ApiKey]":
        async with _opened_store(_settings(data)) as store:
            return await store.keys()

    stored = asyncio.run(read())
    if as_json:
        print_json({"keys": [_public(key) for key in stored]})
        return
    for key in stored:
        scopes, groups = ",".join(key.scopes), ",".join(key.groups) or "-"
        out.print(f"{key.key_id}  {_state(key):8} {key.tenant:16} {scopes:20} {groups:16} {key.label}")
    if not stored:
        err.print("no keys: create one with `freshline keys create`")


def rotate(
    *,
    key_id: KeyId,
    overlap_hours: Annotated[float, typer.Option(min=0.0, help="Hours for which the old secret stays valid.")] = 24.0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Rotate the secret of a key and print the new token once. Both are accepted until the overlap ends.

    Examples:
      freshline keys rotate 8f14e45fceea167a
      freshline keys rotate 8f14e45fceea167a --overlap-hours 0 --json
    """
    from infra.credentials.api_keys import SECRET_BYTES, Token, rotated  # noqa: PLC0415 - heavy

    settings, random, now_ms = _settings(data), secrets.token_bytes(SECRET_BYTES), time.time() * 1_000
    tokens: dict[str, Token] = {}

    def change(key: "ApiKey") -> "ApiKey":
        if key.revoked_ms is not None:
            raise fail(f"key {key_id} is revoked: create another one with `freshline keys create`")
        changed, tokens[key_id] = rotated(key, random, now_ms=now_ms, overlap_ms=overlap_hours * _HOUR_MS)
        return changed

    key = _changed(settings, key_id, change)
    _show_token(settings, key, str(tokens[key_id]), as_json=as_json)


def revoke(*, key_id: KeyId, data: Data = None, as_json: Json = False) -> None:
    """Revoke a key permanently. All processes reject it within a few seconds.

    Examples:
      freshline keys revoke 8f14e45fceea167a
    """
    from infra.credentials.api_keys import revoked  # noqa: PLC0415 - heavy

    now_ms = time.time() * 1_000
    key = _changed(_settings(data), key_id, lambda key: revoked(key, now_ms=now_ms))
    if as_json:
        print_json(_public(key))
    else:
        out.print(f"revoked: {key.key_id}  {key.label}")


def _settings(data: Path | None) -> "Settings":
    from freshline.installation import find  # noqa: PLC0415 - heavy

    return find(data)


@asynccontextmanager
async def _opened_store(settings: "Settings") -> "AsyncIterator[OpenSearchKeys]":
    from infra.opensearch.client import connect  # noqa: PLC0415 - heavy
    from infra.opensearch.keys import OpenSearchKeys  # noqa: PLC0415 - as above

    client = connect(settings.opensearch)
    try:
        yield OpenSearchKeys(client, settings.names)
    finally:
        await client.close()


def _changed(settings: "Settings", key_id: str, change: "Callable[[ApiKey], ApiKey]") -> "ApiKey":
    async def run() -> "ApiKey | None":
        async with _opened_store(settings) as store:
            return await store.change(key_id, change)

    key = asyncio.run(run())
    if key is None:
        raise fail(f"no key {key_id!r}: see `freshline keys list`")
    return key


def _show_token(settings: "Settings", key: "ApiKey", token: str, *, as_json: bool) -> None:
    if as_json:
        print_json(_public(key) | {"token": token})
        return
    out.print(token)
    wait_s = settings.credentials.refresh_s
    err.print(
        f"Store the token now: it cannot be shown again. Key {key.key_id} of tenant {key.tenant}, accepted by all "
        f"processes in {wait_s:g} s."
    )


def _public(key: "ApiKey") -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"secrets"}) | {"state": _state(key), "secrets": len(key.secrets)}


def _state(key: "ApiKey") -> str:
    if key.revoked_ms is not None:
        return "revoked"
    return "expired" if key.expires_ms is not None and key.expires_ms <= time.time() * 1_000 else "valid"
