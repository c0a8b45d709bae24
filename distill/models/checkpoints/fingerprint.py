"""Whether a model's folder still holds what it held, without reading all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.models.checkpoints.hub import ADAPTER, CONFIG, base_folder

_SAMPLE = 4096  # bytes from the middle of every tensor
_WHOLE = (CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def fingerprint(folder: Path) -> str:
    """Of config, tokenizer, names and shapes of all tensors, and some bytes of each.

    Of an adapter, its base's too.
    """
    digest = hashlib.sha256()
    if (base := base_folder(folder)) != folder:
        digest.update(fingerprint(base).encode() + (folder / ADAPTER).read_bytes())
    for path in map(folder.joinpath, _WHOLE):
        digest.update(path.read_bytes() if path.exists() else b"-")
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            start = file.tell()
            try:
                tensors = json.loads(header)
            except ValueError:  # damaged, which those who load it say
                continue
            for tensor in tensors.values():
                first, last = tensor.get("data_offsets", (0, 0))
                file.seek(start + max(first, (first + last - _SAMPLE) // 2))
                digest.update(file.read(min(_SAMPLE, last - first)))
    return digest.hexdigest()[:12]
