"""Safetensors files of any size, written and read tensor by tensor, so that a model never lies in memory as a whole.

The library writes a file only from tensors that are all in memory; hence the small writer here. It reads what it wrote
back before it lets go of it, and leaves the header to the library to check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nscmerge.errors import AdapterError
from nscmerge.lazy import Lazy

#: Size in bytes beyond which a new file is begun. Writing needs no memory for it; readers that load whole files do.
SHARD_BYTES = 1 << 30
#: Bytes written, and read back, at a time.
_PIECE = 1 << 24

#: The format's names of dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorWriter:
    """Writes one safetensors file, tensor by tensor, within a ``with`` block.

    Args:
        path: File to write.
        names: Tensors that may come, so that room for the header is left before the data; not all of them need to.
        metadata: Strings for the header.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self._metadata = path, dict(metadata or {"format": "pt"})
        # 160 bytes hold dtype, offsets and eight dimensions of one tensor; the format lets blanks fill the rest.
        room = 64 + len(json.dumps(self._metadata)) + sum(160 + len(json.dumps(name)) for name in names)
        self._start = 8 + -(-room // 8) * 8
        self._entries: dict[str, dict[str, Any]] = {}
        self.size = 0
        self._out = path.open("wb")
        self._out.seek(self._start)
        self._back = path.open("rb", buffering=0)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._out.close()
            self._back.close()
        if error is None:
            self._check()

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], blocks: Iterable[Tensor]) -> None:
        """Write a tensor that comes in ``blocks``, which give its entries in order.

        Raises:
            AdapterError: The tensor is there already, its blocks do not fill it, or it does not read back equal.
        """
        if name in self._entries:
            raise AdapterError(f"{self.path.name}: '{name}' comes twice; a file holds every tensor once.")
        begin = self.size
        for block in blocks:
            self._write(name, block.to(dtype))
        if self.size - begin != (expected := dtype.itemsize * math.prod(shape)):
            raise AdapterError(
                f"{self.path.name}: '{name}' came in {self.size - begin} bytes; a {tuple(shape)} tensor of {dtype} "
                f"has {expected}."
            )
        self._entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, self.size]}

    def _write(self, name: str, block: Tensor) -> None:
        data = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, data.numel(), _PIECE):
            piece = data[start : start + _PIECE]
            self._out.write(piece.numpy().data)
            self._out.flush()
            self._back.seek(self._start + self.size)
            read = bytearray(len(piece))
            self._back.readinto(read)
            if not torch.equal(torch.frombuffer(read, dtype=torch.uint8), piece):
                raise AdapterError(
                    f"{self.path.name}: '{name}' does not read back as it was written, so nothing is kept. Check the "
                    "disk, or write to another one."
                )
            self.size += len(piece)

    def _finish(self) -> None:
        header = json.dumps({"__metadata__": self._metadata, **self._entries}).encode()
        self._out.seek(0)
        self._out.write((self._start - 8).to_bytes(8, "little"))
        self._out.write(header.ljust(self._start - 8))
        self.path.chmod(0o644)

    def _check(self) -> None:
        """Raise unless the library finds in the file what was written, and nothing else."""
        with safe_open(self.path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
        if found != {name: (e["dtype"], e["shape"]) for name, e in self._entries.items()}:
            raise AdapterError(f"{self.path.name}: its header does not read back as it was written. Check the disk.")


class ShardWriter:
    """Writes tensors to ``<stem>.safetensors``, or to shards with an index beside them, as model hubs do.

    Within a ``with`` block. Shards are ``<stem>-00001-of-0000N.safetensors``; a tensor above the limit gets its own.

    Args:
        folder: Existing folder.
        stem: Start of the file names.
        names: Tensors that may come.
        limit: Bytes of data in one file.
    """

    def __init__(self, folder: Path, stem: str, names: Sequence[str], limit: int = SHARD_BYTES) -> None:
        self._folder, self._stem, self._names, self._limit = folder, stem, names, limit
        self._shard: TensorWriter | None = None
        self._places: dict[str, int] = {}
        self._count = self._total = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, trace)
        if error is None:
            self._name()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in its own dtype, and begin a new shard before it where it would not fit.

        Raises:
            AdapterError: It is there already, or does not read back as it was written.
        """
        if name in self._places:
            raise AdapterError(f"{self._stem}: '{name}' comes twice; a tensor has one place.")
        if self._shard is not None and self._shard.size + tensor.nbytes > self._limit:
            self._shard.__exit__(None, None, None)
            self._shard = None
        if self._shard is None:
            self._count += 1
            self._shard = TensorWriter(self._path(self._count), self._names)
        self._shard.add(name, tensor.dtype, tensor.shape, [tensor])
        self._places[name] = self._count
        self._total += tensor.nbytes

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number:05d}.part"

    def _name(self) -> None:
        """Give the shards their names, which say how many there are, and write the index."""
        if self._count == 1:
            self._path(1).rename(self._folder / f"{self._stem}.safetensors")
        if self._count < 2:
            return
        files = {n: f"{self._stem}-{n:05d}-of-{self._count:05d}.safetensors" for n in range(1, self._count + 1)}
        for number, file in files.items():
            self._path(number).rename(self._folder / file)
        places = {name: files[number] for name, number in sorted(self._places.items())}
        index = {"metadata": {"total_size": self._total}, "weight_map": places}
        path = self._folder / f"{self._stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def open_tensors(files: Sequence[Path], who: str) -> Lazy[Tensor]:
    """Return all tensors of some safetensors files by name, each read when asked for, in its stored dtype.

    Raises:
        AdapterError: Now or when a tensor is read: a file is damaged or gone. Now: two files hold the same name.
    """
    places: dict[str, Path] = {}
    for path in files:
        with opened(path, who) as file:
            names = list(file.keys())
        if double := sorted(set(names) & set(places)):
            raise AdapterError(f"{who}: key '{double[0]}' stands in two shards. Save the adapter again.", "double-key")
        places |= dict.fromkeys(names, path)

    def read(name: str) -> Tensor:
        with opened(places[name], who) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return Lazy(sorted(places), read)


@contextmanager
def opened(path: Path, who: str) -> Iterator[Any]:
    """Yield the library's handle of a safetensors file; ``who`` says in messages whose it is.

    Raises:
        AdapterError: The file is damaged or gone.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{who}: {path.name} cannot be read ({error}). Copy it again.", "weights-damaged") from error
