"""Whether a run can be logged to Weights & Biases from here: the package, the mode, and a key where one is needed."""

from __future__ import annotations

import configparser
import netrc
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from primus_bridge.errors import ConfigError, did_you_mean

MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    # wandb's other names, which only WANDB_MODE and its settings files have
    "shared": "online",
    "run": "online",
    "dryrun": "offline",
}
SERVER = "https://api.wandb.ai"


def check_package() -> None:
    """Raises ConfigError when wandb is not installed."""
    with suppress(ImportError):
        import wandb

        if hasattr(wandb, "init"):  # a folder of runs called wandb/ is a package without anything in it
            return
    raise ConfigError(
        "Weights & Biases needs its package: pip install 'primus-bridge[wandb]', or leave it out with --no-wandb",
        where="wandb",
    )


def settled_mode(asked: str | None) -> str:
    """What of MODES' values holds: ``asked``, else what WANDB_MODE says, else wandb's settings files, else online.

    Raises ConfigError for another word.
    """
    found = os.environ.get("WANDB_MODE")
    mode, where = (asked, "wandb_mode") if asked else (found, "WANDB_MODE")
    if not mode:
        mode, where = _settings().get("mode", "online"), "the settings of wandb"
    if mode not in MODES:
        raise ConfigError(
            f"unknown mode '{mode}'{did_you_mean(mode, MODES)}; the modes are online, offline and disabled", where=where
        )
    return MODES[mode]


def check_login(where: str) -> None:
    """Raises ConfigError where ``wandb.init`` would find no key. The network is not asked whether a key is good."""
    settings = _settings()
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", SERVER)
    if not _in_netrc(urlsplit(server).netloc):
        raise ConfigError(
            f"Weights & Biases has no key for {server}: log in with `wandb login` or set WANDB_API_KEY, keep the run "
            "here with --wandb_mode offline, or leave it out with --no-wandb",
            where=where,
        )


def _settings() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and `wandb init` write down: the user's file, then the one of this folder."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    here = Path(os.environ.get("WANDB_DIR", "."))
    found: dict[str, str] = {}
    for file in (home / "settings", here / "wandb" / "settings", here / ".wandb" / "settings"):
        parser = configparser.ConfigParser()
        with suppress(OSError, UnicodeDecodeError, configparser.Error):  # wandb says it, and reads on
            parser.read(file)
            found |= parser.items("default")
    return found


def _in_netrc(host: str) -> bool:
    usual = [Path("~/.netrc"), Path("~/_netrc")]
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else usual:
        with suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc(file.expanduser()).authenticators(host) is not None
    return False
