"""The verb `export push`: an encoder folder to a Hugging Face hub, by the hub's own client.

Accounts, tokens and gates are the hub's: log in with its own command (`hf auth login`) first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eosin.configs.errors import EosinError, InputError
from eosin.pretrain.verify_encoder import VerifyEncoderConfig, verify_encoder


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Uploads an encoder folder; nothing is sent until `really` is true."""

    encoder: Path
    """Folder that `eosin export` wrote."""
    repo: str
    """``ORG/NAME`` on the hub."""
    really: bool = False
    """Upload. Without it, everything is checked and what would be done is printed."""
    private: bool = True
    """Make a new repository private; one that is there stays as it is."""
    gated: Literal["no", "auto", "manual"] = "no"
    """Who may download: anyone, whoever accepts the terms, or whom you let."""

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise ValueError(f"repo={self.repo} should be ORG/NAME")


def push(config: PushConfig) -> None:
    """Checks the folder, says what would be sent, and sends it where that is asked for.

    Raises:
        InputError: it holds no encoder, or states no licence.
        EosinError: a check differs, or the hub refuses.
    """
    verify_encoder(VerifyEncoderConfig(encoder=config.encoder))
    described: dict[str, Any] = json.loads((config.encoder / "config.json").read_text())
    if not described["eosin"].get("licence"):
        raise InputError(
            f"{config.encoder} states no licence: nobody may use what states none; export it with "
            "licence=…"
        )
    files = sorted(path for path in config.encoder.rglob("*") if path.is_file())
    print(f"to {config.repo} ({'private' if config.private else 'public'} if new, "
          f"gated: {config.gated}):")  # fmt: skip
    for path in files:
        print(f"  {path.relative_to(config.encoder)}  {path.stat().st_size / 1e6:,.1f} MB")
    if not config.really:
        print("nothing was sent; give really=true to send it")
        return
    from huggingface_hub import HfApi  # here: nothing else needs the network

    api = HfApi()
    try:
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        api.upload_folder(
            repo_id=config.repo, folder_path=config.encoder, commit_message="Encoder of eosin"
        )
        if config.gated != "no":
            api.update_repo_settings(config.repo, gated=config.gated)
    except Exception as error:  # the hub raises by reason: network, account, rights
        reason = " ".join(str(error).split())[:200]
        raise EosinError(f"{config.repo}: the hub refuses ({reason}); log in with 'hf auth login'"
                         ) from error  # fmt: skip
    print(f"sent; timm.create_model('hf-hub:{config.repo}', pretrained=True) loads it")
