"""What `generate` is asked to do, checked as far as it can be without loading weights or importing torch.

The launcher of `--ranks` and every rank read the request the same way, so most mistakes are told before a rank starts.
"""

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from tokenizers import Tokenizer

from crossdock.errors import CheckpointError, ConfigError

DEFAULT_NEW_TOKENS = 64
ID = re.compile(r"[+-]?[0-9]+")  # int() takes 5_0 and the digits of every script besides
EXAMPLE_PROMPT = "def read_config(path):"


@dataclass(frozen=True)
class Request:
    """A checkpoint and the prompts for it as token ids; `tokenizer` is None where the checkpoint has none."""

    directory: Path
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    prompts: list[list[int]]
    max_new_tokens: int

    def text(self, token_ids: list[int]) -> str | None:
        """The text of token ids, None without a tokenizer."""
        return None if self.tokenizer is None else str(self.tokenizer.decode(token_ids))


def example_directory() -> Path:
    """Where the bundled example checkpoint is, or would be."""
    return Path(str(resources.files("crossdock"))) / "data" / "example"


def read_request(
    checkpoint: Path | None,
    texts: list[str],
    id_lists: list[str],
    max_new_tokens: int | None,
    draft_tokens: int | None,
) -> Request:
    """Finds the checkpoint (the bundled one by default) and turns prompts into ids: texts first, then `--prompt-ids`.

    Raises CheckpointError for a directory that is no checkpoint, ConfigError for prompts or options the checkpoint
    cannot serve, and typer.BadParameter for ids that are no integers.
    """
    prompts_given = [parse_ids(text) for text in id_lists]
    directory = checkpoint or example_directory()
    config = read_config_json(directory, bundled=checkpoint is None)
    if not texts and not id_lists:
        if checkpoint is not None:
            raise typer.BadParameter("nothing to generate from: give --prompt TEXT or --prompt-ids IDS")
        texts = [EXAMPLE_PROMPT]
    tokenizer = _tokenizer(directory, needed=bool(texts))
    prompts = [_encode(tokenizer, number, text) for number, text in enumerate(texts)] if tokenizer else []
    prompts += prompts_given
    _check_ids(prompts, config.get("vocab_size"))
    new_tokens = _new_tokens(prompts, config.get("max_position_embeddings"), max_new_tokens)
    if draft_tokens and not config.get("num_nextn_predict_layers"):
        raise ConfigError(
            f"--draft-tokens {draft_tokens} needs a model with an MTP layer; {directory}/config.json names none "
            f"(num_nextn_predict_layers is {config.get('num_nextn_predict_layers')})"
        )
    return Request(directory, config, tokenizer, prompts, new_tokens)


def parse_ids(text: str) -> list[int]:
    """ "5,17,9" -> [5, 17, 9]; raises typer.BadParameter where a piece is no integer."""
    pieces = [piece.strip() for piece in text.split(",")] if text.strip() else []
    if not all(ID.fullmatch(piece) for piece in pieces):
        raise typer.BadParameter(f"--prompt-ids must be integers separated by commas, found {text!r}")
    return [int(piece) for piece in pieces]


def read_config_json(directory: Path, *, bundled: bool = False) -> dict[str, Any]:
    """The checkpoint's config.json. Raises CheckpointError where it is absent or no JSON object."""
    path = directory / "config.json"
    if bundled and not path.is_file():
        raise CheckpointError(
            f"the bundled example checkpoint is not there ({path} is missing): name a directory instead"
        )
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise CheckpointError(f"checkpoint {directory} must be a directory with a config.json, found {found}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {directory} has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def _tokenizer(directory: Path, *, needed: bool) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        if needed:
            raise CheckpointError(f"--prompt needs {path}, which is missing: give token ids with --prompt-ids instead")
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer that can be read: {error}") from None


def _encode(tokenizer: Tokenizer, number: int, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
        raise ConfigError(f"prompt {number} is not valid UTF-8 at character {error.start}: {text!r}") from None
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def _check_ids(prompts: list[list[int]], vocabulary: int | None) -> None:
    for number, ids in enumerate(prompts):
        if not ids:
            raise ConfigError(f"prompt {number} is empty: a prompt needs at least one token")
        outside = [i for i in ids if i < 0 or (isinstance(vocabulary, int) and i >= vocabulary)]
        if outside:
            expected = f"in 0..{vocabulary - 1}" if isinstance(vocabulary, int) else "at least 0"
            raise ConfigError(f"prompt {number}: token id {outside[0]} is outside the vocabulary, expected {expected}")


def _new_tokens(prompts: list[list[int]], context: int | None, wanted: int | None) -> int:
    """Tokens to generate: what was asked for, which must fit into the context, or the default as far as it fits."""
    number, longest = max(enumerate(map(len, prompts)), key=lambda item: item[1])
    room = context - longest + 1 if isinstance(context, int) else DEFAULT_NEW_TOKENS
    if room < 1:
        raise ConfigError(
            f"prompt {number} has {longest} tokens, which leaves no room in the model's context of {context} "
            "(max_position_embeddings)"
        )
    if wanted is not None and isinstance(context, int) and wanted > room:
        raise ConfigError(
            f"prompt {number} has {longest} tokens and {wanted} new ones were asked for, "
            f"together more than the model's context of {context} (max_position_embeddings)"
        )
    return wanted or min(DEFAULT_NEW_TOKENS, room)
