"""A prompt template of one's own as YAML: a prefix and a suffix for each role."""

from __future__ import annotations

from typing import Any

from primus_bridge.config.yaml_file import Located, load_yaml
from primus_bridge.data.templates.roles import Role, RoleTable
from primus_bridge.errors import ConfigError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
OPTIONS = {
    "bos": (bool, str),
    "default_system": (str,),
    "system_in_user": (bool,),
    "strip": (bool,),
    "alternate": (bool,),
    "end": (str,),
    "markers": (list,),
}
WORDS = {bool: "true or false", str: "text", list: "a list of texts"}


def load_table(path: str) -> RoleTable:
    """The table in a YAML file. Raises ConfigError (file:line) for an unknown key, a wrong value or a missing role.

    ``user``, ``assistant``, and where there are such turns ``system`` and ``tool``: each ``{prefix: text,
    suffix: text}``. The assistant's suffix is its end of turn and is learnt (not the white space at its end). Texts may
    hold ``{bos_token}`` and ``{eos_token}``. Optional: ``bos`` (true, the default: as the tokenizer adds it; false; or
    text), ``default_system`` (text), ``system_in_user`` (true: the system stands in the first user turn), ``strip``
    (true: contents lose outer white space), ``alternate`` (true: user and assistant must alternate), ``end`` (text
    after the last turn), ``markers`` (texts that are control tokens where the tokenizer has them).
    """
    tree = load_yaml(path)
    values: dict[str, Any] = {}
    for key, node in tree.value.items():
        if key in ROLES:
            values[key] = _role(key, node)
        elif key in OPTIONS:
            values[key] = _option(key, node)
        else:
            known = (*ROLES, *OPTIONS)
            raise ConfigError(
                f"unknown key '{key}'{did_you_mean(key, known)}; known are {', '.join(known)}", where=node.where
            )
    for role in ("user", "assistant"):
        if role not in values:
            raise ConfigError(f"the role '{role}' is missing; give it a prefix and a suffix", where=tree.where)
    if not values["assistant"].suffix:
        raise ConfigError(
            "the assistant has no suffix, so the model would never learn to stop; give it one, such as '{eos_token}'",
            where=tree.value["assistant"].where,
        )
    if values.get("default_system") and "system" not in values:
        raise ConfigError(
            "default_system needs a role 'system' with its prefix and suffix", where=tree.value["default_system"].where
        )
    return RoleTable(**values)


def _role(name: str, node: Located) -> Role:
    if not isinstance(node.value, dict):
        raise ConfigError(f"'{name}' must hold the keys prefix and suffix", where=node.where)
    for key, item in node.value.items():
        if key not in ("prefix", "suffix"):
            raise ConfigError(f"unknown key '{key}' in '{name}'; known are prefix and suffix", where=item.where)
        if not isinstance(item.value, str):
            raise ConfigError(f"'{name}.{key}' must be text (in quotes), found {item.value!r}", where=item.where)
    return Role(**{key: item.value for key, item in node.value.items()})


def _option(name: str, node: Located) -> Any:
    value = node.value
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not isinstance(value, OPTIONS[name]) or (isinstance(value, list) and not texts):
        words = " or ".join(WORDS[kind] for kind in OPTIONS[name])
        raise ConfigError(f"'{name}' must be {words}, found {value!r}", where=node.where)
    return tuple(value) if isinstance(value, list) else value
