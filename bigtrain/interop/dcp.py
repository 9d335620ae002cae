"""Read weights of a torch.distributed.checkpoint (DCP) directory without trusting what is pickled in it.

`.metadata` is a pickle. It is read by an Unpickler that knows the few classes such a file consists of and refuses
every other name, before anything of that name could run. The data items are torch.save archives, read with
`weights_only=True`. DCP has no checksums: only sizes and shapes can be checked.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.boxes import Box, Index, intersection
from bigtrain.checkpoint.location import exists, read, reason, size
from bigtrain.errors import UserError

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *(
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
        ),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},  # and dtypes, see below
    "torch.serialization": {"_get_layout"},  # looks a word up in a table
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath"},  # Python 3.13
}
"""All that torch 2.0 to 2.13 write into .metadata."""


class _Unpickler(pickle.Unpickler):
    """Finds only what `_ALLOWED` names."""

    where = ""

    def find_class(self, module: str, name: str) -> Any:
        """Called for every class or function that the pickle asks for, before it is used."""
        # vars, not getattr: torch imports some of its modules when they are asked for.
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if name not in _ALLOWED.get(module, ()):
            raise UserError(
                f"asks for {module}.{name}, which no checkpoint's metadata needs",
                where=self.where,
                do="do not trust this directory: loading it in the usual way would run that code",
            )
        if module.startswith("pathlib"):
            return _path
        return super().find_class(module, name)


def _path(*parts: str) -> str:
    """A path is only a word here; one of another system could not even be made."""
    return "/".join(parts)


@dataclass(frozen=True)
class Item:
    """One stored box of a tensor: `length` bytes of `file` from `start` on."""

    box: Box
    file: Path
    start: int
    length: int


class DcpWeights:
    """All tensors of a DCP directory, optimizer states included; items are read when they are needed."""

    def __init__(self, folder: Path) -> None:
        """Reads .metadata. UserError when it is damaged, asks for what it should not, or names missing files."""
        self.folder = folder
        metadata = _read_metadata(folder / METADATA)
        try:
            self.tensors = _items(folder, metadata)
            self.shapes = {
                name: tuple(value.size)
                for name, value in metadata.state_dict_metadata.items()
                if hasattr(value, "chunks")
            }
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"is not what torch writes ({type(e).__name__}: {e})", where=str(folder / METADATA), do=_AGAIN
            ) from e
        files = sorted({item.file for items in self.tensors.values() for item in items})
        if missing := [file.name for file in files if not exists(file)]:
            raise UserError(
                f"{len(missing)} of {len(files)} data files are missing: {', '.join(missing[:5])}",
                where=str(folder),
                do=_AGAIN,
            )
        self._last: tuple[Item, torch.Tensor] | None = None

    def problem(self, name: str) -> str:
        """Why a tensor that is there cannot be read; "" when it can."""
        whole = sum(item.box.elements for item in self.tensors[name])
        wanted = Box((), self.shapes[name]).elements
        return "" if whole == wanted else f"only {whole} of its {wanted} elements are stored"

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Copy a box into `target`, a tensor or view of the box's sizes, casting to its dtype.

        Loads the items that overlap it, one at a time; the last one is kept, for the next box is often in it too.
        """
        for item in self.tensors[name]:
            overlap = intersection(item.box, box)
            if overlap is None:
                continue
            if self._last is None or self._last[0] is not item:
                self._last = None  # never two in memory
                self._last = item, _load(item, name)
            part = self._last[1][overlap.within(item.box.offset)]
            target.detach()[overlap.within(box.offset)].copy_(part)


_AGAIN = "copy the directory again, or save it again with torch.distributed.checkpoint"


def _read_metadata(path: Path) -> Any:
    try:
        raw = read(path)
    except OSError as e:
        raise UserError(f"cannot be read: {reason(e)}", where=str(path), do=_AGAIN) from e
    reader = _Unpickler(io.BytesIO(raw))
    reader.where = str(path)
    try:
        found = reader.load()
    except UserError:
        raise
    except Exception as e:  # a damaged pickle can raise anything
        raise UserError(f"is damaged ({type(e).__name__}: {e})", where=str(path), do=_AGAIN) from e
    if type(found).__name__ != "Metadata":
        raise UserError(f"holds a {type(found).__name__}, no metadata", where=str(path), do=_AGAIN)
    return found


def _items(folder: Path, metadata: Any) -> dict[str, list[Item]]:
    """Where the boxes of every tensor lie. Raises as the untrusted content pleases."""
    found: dict[str, list[Item]] = {}
    stored = {(key.fqn, _index(key.offset or ())): info for key, info in metadata.storage_data.items()}
    for name, tensor in metadata.state_dict_metadata.items():
        if not hasattr(tensor, "chunks"):
            continue  # a pickled object (steps, learning rates): never read
        found[name] = []
        for chunk in tensor.chunks:
            box = Box(_index(chunk.offsets), _index(chunk.sizes))
            info = stored[name, box.offset]
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{name} is stored compressed or encrypted")
            path = Path(info.relative_path)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{path} is outside the directory")
            found[name].append(Item(box, folder / str(path), int(info.offset), int(info.length)))
    return found


def _index(numbers: Any) -> Index:
    return tuple(int(n) for n in numbers)


def _load(item: Item, name: str) -> torch.Tensor:
    """One item. UserError naming file and tensor when it is damaged or not the tensor that was announced."""
    try:
        end = item.start + item.length
        raw = read(item.file, item.start, end) if end <= size(item.file) else b""
        if len(raw) != item.length:
            raise UserError(f"ends inside {name}", where=str(item.file), do=_AGAIN)
        tensor = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # zip, pickle and torch each have their own
        raise UserError(
            f"{name} cannot be read ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})",
            where=str(item.file),
            do=_AGAIN,
        ) from e
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != item.box.sizes:
        raise UserError(
            f"{name} is not of the announced shape {item.box.sizes}", where=str(item.file), do=_AGAIN
        )
    return tensor
