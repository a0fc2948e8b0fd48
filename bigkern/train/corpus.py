"""Text for ``bigkern train``: any file or folder as tokens, and batches that depend only on seed and step."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bigkern.terminal.console import Failure
from bigkern.terminal.files import write_atomically

VALIDATION_SHARE = 0.1


def standard_library() -> list[Path]:
    """The source of Python's own standard library, the text that every machine has, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]


def read(paths: list[Path]) -> bytes:
    """The bytes of all files, in an order shuffled once and for all so that the split cuts across them.

    A file named outright is read whatever it holds; in a folder, files with a zero byte are passed over.

    Raises:
        Failure: a path does not exist or cannot be read, or there is no text.
    """
    files = _files(paths) if paths else standard_library()
    random.Random(0).shuffle(files)
    parts: list[bytes] = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise Failure(f"cannot read {file}: {error.strerror or error}") from error
        if file in paths or b"\0" not in content:
            parts.append(content)
    text = b"\n".join(part for part in parts if part)
    if not text:
        where = ", ".join(map(str, paths)) or "Python's standard library"
        raise Failure(f"no text in {where}")
    return text


def _files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                files.extend(p for p in sorted(path.rglob("*")) if p.is_file())
            elif path.exists():
                files.append(path)
            else:
                raise Failure(f"cannot read {path}: no such file or folder")
        except OSError as error:
            raise Failure(f"cannot read {path}: {error.strerror}") from error
    return files


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray: ...
    def decode(self, tokens: list[int]) -> str: ...


class Bytes:
    """Every byte is a token: no training, no unknown token, 256 of them."""

    vocab_size = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Bpe:
    """Byte-level byte-pair encoding by Hugging Face's ``tokenizers``."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: bytes, vocab_size: int) -> Bpe:
        tokenizers = _tokenizers()
        most = 256 + len(text)  # every byte, and a merge at every place
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=min(vocab_size, most), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_pieces(text), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, content: bytes) -> Bpe:
        """The tokenizer that ``dump`` gave the content of.

        Raises:
            ValueError: this version of the package cannot read it.
        """
        try:
            return cls(_tokenizers().Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"it is not a tokenizer ({error})") from error

    def dump(self) -> bytes:
        return str(self._tokenizer.to_str()).encode()

    def encode(self, text: bytes) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(_pieces(text))
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.concatenate([np.asarray(piece.ids, dtype=kind) for piece in encoded])

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise Failure("--tokenizer bpe needs the package tokenizers: pip install 'bigkern[cli]'") from error
    return tokenizers


def _pieces(text: bytes, size: int = 1 << 16) -> list[str]:
    decoded = text.decode("utf-8", errors="replace")
    return [decoded[i : i + size] for i in range(0, len(decoded), size)]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenised text in two parts, and what it was made from."""

    tokenizer: Tokenizer
    train: Tensor  # [N] uint8, uint16 or int32
    validation: Tensor
    digest: str  # of the text and the tokenizer

    def batch(self, part: str, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[batch, context]`` int64; the same for the same seed and step, always."""
        tokens = self.train if part == "train" else self.validation
        draw = np.random.Generator(np.random.Philox(key=[seed, part == "train"], counter=[0, 0, 0, step]))
        starts = draw.integers(0, len(tokens) - context, size=batch)
        rows = torch.stack([tokens[s : s + context + 1] for s in starts.tolist()]).long()
        return rows[:, :-1], rows[:, 1:].contiguous()

    def stretches(self, part: str, batch: int, context: int) -> int:
        """How many stretches of ``context`` tokens each of ``batch`` streams has."""
        tokens = self.train if part == "train" else self.validation
        return (len(tokens) // batch - 1) // context

    def stretch(self, part: str, place: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[batch, context]`` int64: a stretch of the text cut into ``batch`` streams."""
        tokens = self.train if part == "train" else self.validation
        streams = tokens[: len(tokens) // batch * batch].view(batch, -1)
        rows = streams[:, place * context : (place + 1) * context + 1].long()
        return rows[:, :-1], rows[:, 1:].contiguous()


def load(
    paths: list[Path],
    tokenizer: str,
    vocab_size: int,
    least: int,
    cache: Path,
    say: Callable[[str], object] = lambda line: None,
) -> Corpus:
    """Read, tokenise and split; a BPE tokenizer and its tokens are kept in ``cache`` and found again there.

    ``say`` is told if they are damaged and therefore made anew.

    Raises:
        Failure: the data cannot be read, or one of its parts has less than ``least`` tokens.
    """
    text = read(paths)
    digest = hashlib.sha256(text).hexdigest()[:16]
    if tokenizer == "bytes":
        chosen: Tokenizer = Bytes()
        tokens = chosen.encode(text)
    else:
        chosen, tokens = _bpe(text, vocab_size, digest, cache, say)
        digest += "-" + hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    split = int(len(tokens) * (1 - VALIDATION_SHARE))
    shortest = min(split, len(tokens) - split)
    if shortest < least:
        raise Failure(
            f"the data is too short: its smaller part has {shortest} tokens, and a step needs {least}; "
            "give more text or a smaller --context or --batch"
        )
    whole = torch.from_numpy(tokens.astype(np.uint8 if chosen.vocab_size <= 256 else np.int32))
    return Corpus(chosen, whole[:split], whole[split:], f"{tokenizer}-{chosen.vocab_size}-{digest}")


# ---- the cache of a BPE tokenizer ------------------------------------------------------------------

LABEL, WORDS, NUMBERS = "tokens.json", "tokenizer.json", "tokens.npy"


def _bpe(
    text: bytes, vocab_size: int, digest: str, cache: Path, say: Callable[[str], object]
) -> tuple[Bpe, np.ndarray]:
    made_of = {"text": digest, "vocab_size": vocab_size}
    try:
        if (found := _read_cache(cache, made_of)) is not None:
            return found
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"the tokenizer in {cache} is damaged ({reason}); it is trained anew")
    bpe = Bpe.train(text, vocab_size)
    tokens = bpe.encode(text)
    _write_cache(cache, made_of, {WORDS: bpe.dump(), NUMBERS: _dump_array(tokens)})
    return bpe, tokens


def _read_cache(cache: Path, made_of: dict[str, Any]) -> tuple[Bpe, np.ndarray] | None:
    """What was made of this text; None if there is nothing, or it was made of another.

    Raises:
        OSError, ValueError: a file is missing, or not what was written.
    """
    if not (cache / LABEL).exists():
        return None
    label = json.loads((cache / LABEL).read_text())
    if not isinstance(label, dict) or not isinstance(digests := label.pop("digests", None), dict):
        raise ValueError(f"{LABEL} has no digests")
    if label != made_of:
        return None
    contents = {name: (cache / name).read_bytes() for name in (WORDS, NUMBERS)}
    for name, content in contents.items():
        if digests.get(name) != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{name} is not what was written")
    return Bpe.load(contents[WORDS]), np.load(io.BytesIO(contents[NUMBERS]))


def _write_cache(cache: Path, made_of: dict[str, Any], contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        write_atomically(cache / name, methodcaller("write_bytes", content))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    label = json.dumps({**made_of, "digests": digests})
    write_atomically(cache / LABEL, methodcaller("write_text", label))  # last: it vouches for both


def _dump_array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
