"""Environment variables of Freshline that no process reads, such as misspelled or removed settings."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from pydantic import BaseModel

from infra.settings import Settings

_PREFIX: Final = "FRESHLINE_"

PROCESS_VARIABLES: Final = frozenset(
    {
        "FRESHLINE_HOME",
        "FRESHLINE_CACHE",
        "FRESHLINE_TEST_STACK",
        "FRESHLINE_TEST_HOME",
        "FRESHLINE_LISTEN_FD",
        "FRESHLINE_READY_FD",
        "FRESHLINE_PEERS_DIR",
    }
)
"""Variables that are read without ``Settings``: by commands, tests, and between processes of one address."""


def setting_variables() -> frozenset[str]:
    """The variable of each setting."""
    return frozenset(_variables(Settings, _PREFIX))


def unknown_variables(names: Iterable[str]) -> Mapping[str, str | None]:
    """Variables with Freshline's prefix that nothing reads.

    Args:
        names: names of environment variables, in any case.

    Returns:
        Each unknown variable, with the most similar setting, or None if none is similar.
    """
    # Without the prefix, which would make all of them similar.
    settings = {setting.removeprefix(_PREFIX): setting for setting in sorted(setting_variables())}
    known = PROCESS_VARIABLES.union(settings.values())
    unknown = {}
    for name in sorted(set(names)):
        upper = name.upper()
        if upper.startswith(_PREFIX) and upper not in known:
            similar = difflib.get_close_matches(upper.removeprefix(_PREFIX), settings, n=1, cutoff=0.75)
            unknown[name] = settings[similar[0]] if similar else None
    return unknown


def _variables(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}"
