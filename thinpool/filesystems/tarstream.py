"""Members of a tar, read strictly from a stream that goes forward only.

The formats: POSIX.1-2017 pax, and GNU tar's manual, "Basic Tar Format"; sparse files as GNU tar's, and as its PAX 0.0, 0.1 and 1.0.

tarfile parses. It is made strict: what it would pass over as the end of the archive (a damaged header, a missing end), numbers
that are none, and headers without bound are errors here. Its own reader of streams copies what it holds at every header; :class:`_Forward` does not.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast
from urllib.parse import unquote

from ..errors import ImportFailed
from .compression import Readable
from .tree import Attributes

PIECE_BYTES = 1 << 20
_HEADER_BYTES_MAX = 1 << 20  # of a PAX header or a long name; Go's archive/tar, and with it Docker, reads no longer ones
_NUMBER = re.compile(r"[0-9]{1,20}")
_TIME = re.compile(r"(-?)([0-9]{1,18})(?:\.([0-9]*))?")
_TIME_MIN_NS, _TIME_MAX_NS = -(2**31) * 10**9, (2**34 - 2**31 - 1) * 10**9  # what ext4 holds (until 2446)
_LONG_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_USUAL = (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE)
_KINDS = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR}
_KINDS |= {tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO, **dict.fromkeys(tarfile.REGULAR_TYPES, stat.S_IFREG)}


class Member(tarfile.TarInfo):
    """A member. A header that is damaged, or missing before the end-of-archive marker, is an error."""

    _stored_at: int | None = None  # where a sparse 1.0 member begins: with its map

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut short: no end-of-archive marker") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged header ({error})") from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        return cls._usual(bytes(buf)) or cls._without_times(super().frombuf(buf, encoding, errors), buf, encoding, errors)

    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> Member:  # what later versions of tarfile call
        return cls._usual(bytes(buf)) or cls._without_times(super()._frombuf(buf, encoding, errors, **options), buf, encoding, errors)  # type: ignore[misc]

    @staticmethod
    def _without_times(member: Member, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """GNU tar has times where POSIX has the first part of a name; tarfile takes them for one."""
        times = bytes(buf[345:500]).partition(b"\0")[0]
        if times and buf[257:265] == tarfile.GNU_MAGIC and member.type not in tarfile.GNU_TYPES:
            member.name = member.name.removeprefix(times.decode(encoding, errors) + "/")
        return member

    @classmethod
    def _usual(cls, header: bytes) -> Member | None:
        """A header with nothing rare in it, at half the cost; ``None``: it has something, or is damaged."""
        if len(header) != tarfile.BLOCKSIZE or header[156:157] not in _USUAL or header[257:263] not in (b"ustar\0", b"ustar "):
            return None
        try:
            if sum(header) - sum(header[148:156]) + 256 != _octal(header[148:156]):
                return None
            member = cls(_text(header[:100]))
            member.mode, member.uid, member.gid = _octal(header[100:108]), _octal(header[108:116]), _octal(header[116:124])
            member.size, member.mtime = _octal(header[124:136]), _octal(header[136:148])
            if member.size < 0:
                return None
        except ValueError:  # numbers in base 256
            return None
        member.type = header[156:157]
        if header[157]:
            member.linkname = _text(header[157:257])
        if header[345] and header[262] == 0:  # GNU has other things there
            member.name = f"{_text(header[345:500])}/{member.name}"
        if member.type == tarfile.DIRTYPE:
            member.name = member.name.rstrip("/")
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile's hook for subclasses
        if self.size < 0:
            raise tarfile.ReadError("damaged header (negative size)")
        if self.type in _LONG_HEADERS and self.size > _HEADER_BYTES_MAX:
            raise tarfile.ReadError(f"damaged header (one of {self.size} bytes)")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]

    def _proc_pax(self, archive: tarfile.TarFile) -> Member:
        found: Member = super()._proc_pax(archive)  # type: ignore[misc]
        if self.type != tarfile.XGLTYPE:
            for key in ("size", "uid", "gid"):  # of what is no number tarfile makes 0
                if key in found.pax_headers and not _NUMBER.fullmatch(found.pax_headers[key]):
                    raise tarfile.ReadError(f"{key} {found.pax_headers[key]!r} is no number")
            realsize = found.pax_headers.get("GNU.sparse.realsize", found.pax_headers.get("GNU.sparse.size"))
            if realsize is not None and "size" in found.pax_headers:  # which is that of what is stored; tarfile takes the last of them for both
                archive.offset = (found._stored_at or found.offset_data) + self._block(int(found.pax_headers["size"]))  # type: ignore[attr-defined]
                found.size = int(realsize)
        return found

    def _proc_gnusparse_10(self, found: Member, headers: dict[str, str], archive: tarfile.TarFile) -> None:
        found._stored_at = archive.fileobj.tell()
        super()._proc_gnusparse_10(found, headers, archive)  # type: ignore[misc]

    @property
    def kind(self) -> int | None:
        """``stat.S_IFMT`` bits; ``None`` for a hard link. Raises ImportFailed for a type that is not known."""
        if self.type == tarfile.LNKTYPE:
            return None
        try:
            return _KINDS[self.type]
        except KeyError:
            raise ImportFailed(f"{self.name!r} is of a type that is not known: {self.type!r}") from None

    def attributes(self) -> Attributes:
        """Raises ImportFailed for numbers that no file can have."""
        kind = self.kind or stat.S_IFREG
        if not (0 <= self.uid < 0xFFFFFFFF and 0 <= self.gid < 0xFFFFFFFF):
            raise ImportFailed(f"{self.name!r} has an owner that is out of range: {self.uid}:{self.gid}")
        if not 0 <= self.mode < 1 << 32:
            raise ImportFailed(f"{self.name!r} has a mode that is out of range: {self.mode}")
        device = 0
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            if not (0 <= self.devmajor < 1 << 12 and 0 <= self.devminor < 1 << 20):
                raise ImportFailed(f"{self.name!r} is a device that is out of range: {self.devmajor}:{self.devminor}")
            device = os.makedev(self.devmajor, self.devminor)
        mtime_ns = min(max(self._mtime_ns(), _TIME_MIN_NS), _TIME_MAX_NS)  # the nearest, as the kernel does it
        mode = 0o777 if kind == stat.S_IFLNK else stat.S_IMODE(self.mode)
        return Attributes(mode=kind | mode, uid=self.uid, gid=self.gid, mtime_ns=mtime_ns, rdev=device)

    def _mtime_ns(self) -> int:
        text = self.pax_headers.get("mtime")
        if text is None:
            return int(self.mtime) * 10**9
        match = _TIME.fullmatch(text)  # exactly: TarInfo keeps a float of it
        if match is None:
            raise ImportFailed(f"{self.name!r} has a time that is no number: {text!r}")
        sign, seconds, fraction = match.groups()
        nanoseconds = int(seconds) * 10**9 + int(((fraction or "") + "0" * 9)[:9])
        return -nanoseconds if sign else nanoseconds

    def xattrs(self) -> dict[str, bytes]:
        """``SCHILY.xattr.NAME`` as it is (star, GNU tar, Go), ``LIBARCHIVE.xattr.NAME`` in base64, its name with ``%``."""
        found: dict[str, bytes] = {}
        for key, value in self.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                found[key[13:]] = value.encode("utf-8", "surrogateescape")
            elif key.startswith("LIBARCHIVE.xattr."):
                found.setdefault(unquote(key[17:], errors="surrogateescape"), base64.b64decode(value + "=" * (-len(value) % 4)))
        return found


def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0] or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


class _Forward:
    """What tarfile wants of a file, over a stream."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._held, self._next = b"", 0  # what was read, and where of it the next byte is
        self._before = 0  # position of the first byte held

    def tell(self) -> int:
        return self._before + self._next

    def seek(self, position: int) -> None:
        if position < self.tell():
            raise tarfile.ReadError("damaged header (data that lies before it)")
        while position > self._before + len(self._held) and self._fill():
            continue
        self._next = min(position - self._before, len(self._held))

    def is_end(self, position: int) -> bool:
        """Goes there, and says whether nothing follows."""
        self.seek(position)
        return self._next == len(self._held) and not self._fill()

    def read(self, size: int) -> bytes:
        """That many bytes, unless the stream ends before."""
        end = self._next + size
        if end <= len(self._held):
            piece = self._held[self._next : end]
            self._next = end
            return piece
        pieces = []
        while size > 0:
            piece = self._held[self._next : self._next + size]
            self._next += len(piece)
            size -= len(piece)
            pieces.append(piece)
            if size and not self._fill():
                break
        return b"".join(pieces)

    def _fill(self) -> bool:
        self._before += len(self._held)
        self._held, self._next = self._stream.read(PIECE_BYTES), 0
        return bool(self._held)

    def close(self) -> None:
        """The stream is its owner's to close."""


class TarStream:
    """The members of a tar, in order; the content of each is to be read before the next one is asked for."""

    def __init__(self, stream: Readable, *, needs_end: bool = True) -> None:
        """``needs_end``: the end-of-archive marker must be there. Some programs write none, nor what fills up the last block of the last member: good
        enough where a digest says that all is there, and Go's archive/tar takes it too."""
        self._file = _Forward(stream)
        self._needs_end = needs_end

    def __iter__(self) -> Iterator[Member]:
        """Raises tarfile.TarError or ValueError where it is damaged. Reads the stream to its end: what checks the whole is there."""
        file: BinaryIO = self._file  # type: ignore[assignment]
        archive = tarfile.TarFile(fileobj=file, mode="r", tarinfo=Member, encoding="utf-8", errors="surrogateescape")
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            assert isinstance(member, Member)
            yield member
            if not self._needs_end and self._file.is_end(archive.offset):
                return
        while self._file.read(PIECE_BYTES):
            continue

    def pieces(self, member: Member) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of a regular file; what lies between is a hole."""
        sparse = cast("list[tuple[int, int]] | None", member.sparse)
        ranges = [(0, member.size)] if sparse is None else sparse
        self._file.seek(member.offset_data)
        done = 0
        for start, length in ranges:
            if start < 0 or length < 0 or (length and start < done) or start + length > member.size:
                raise tarfile.ReadError("damaged map of a sparse file")
            done = start
            end = start + length
            while done < end:
                piece = self._file.read(min(PIECE_BYTES, end - done))
                if not piece:
                    raise tarfile.ReadError("unexpected end of data")
                yield done, piece
                done += len(piece)
