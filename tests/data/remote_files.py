"""A remote file system for tests: files in memory, and faults that happen when they are read."""

import io
from collections.abc import Callable
from typing import ClassVar

from fsspec import AbstractFileSystem


class FaultyFileSystem(AbstractFileSystem):
    """`faulty://bucket/name`. `faults` holds, by path, errors that the next reads raise, one each."""

    protocol = "faulty"
    cachable = False
    store: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[dict[str, list[BaseException]]] = {}
    on_read: ClassVar[Callable[[str], None] | None] = None
    num_opened: ClassVar[int] = 0

    @classmethod
    def clear(cls) -> None:
        cls.store, cls.faults, cls.on_read, cls.num_opened = {}, {}, None, 0

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path in self.store:
            content = self.store[path]
            return {"name": path, "size": len(content), "type": "file", "etag": str(hash(content))}
        if any(name.startswith(path + "/") for name in self.store):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        depth = path.count("/") + 1 if path else 0
        names = {
            "/".join(name.split("/")[: depth + 1]) for name in self.store if name == path or name.startswith(path + "/")
        }
        if not names:
            raise FileNotFoundError(path)
        return [self.info(name) if detail else name for name in sorted(names)]

    def _open(self, path, mode="rb", **kwargs):
        type(self).num_opened += 1
        return _File(self._strip_protocol(path))


class _File(io.BytesIO):
    def __init__(self, path: str) -> None:
        super().__init__(FaultyFileSystem.store[path])
        self._path = path

    def _fail(self) -> None:
        if FaultyFileSystem.on_read is not None:
            FaultyFileSystem.on_read(self._path)
        if FaultyFileSystem.faults.get(self._path):
            raise FaultyFileSystem.faults[self._path].pop(0)

    def read(self, *args):
        self._fail()
        return super().read(*args)

    def readinto(self, buffer):
        self._fail()
        return super().readinto(buffer)
