"""Products as they are downloaded (SAFE, the Standard Archive Format for Europe), in a folder or still in their zip."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

XML_LIMIT = 64 << 20  # bytes; the largest metadata, of a product with many granules, have a few million


class ProductError(ValueError):
    """A product cannot be used.

    Args:
        reason: short and the same for all products with this fault, so that they can be counted.
        detail: which file or value it is about.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Product:
    """The files of one product.

    Args:
        name: of the product, without .SAFE.
        location: its folder, or the zip file.
        inside: its folder inside the zip; "" when it is not in a zip, or at the zip's top.
        sizes: bytes of each file, by its path below the product's folder.
    """

    name: str
    location: str
    inside: str
    sizes: Mapping[str, int]

    @property
    def zipped(self) -> bool:
        """Whether the product is in a zip."""
        return not os.path.isdir(self.location)

    def address(self, file: str) -> str:
        """What GDAL opens to read one of the files."""
        path = str(PurePosixPath(self.inside) / file)
        return f"/vsizip/{self.location}/{path}" if self.zipped else os.path.join(self.location, file)

    def xml(self, file: str) -> ET.Element:
        """The root element of one of the files.

        Raises:
            ProductError: it is too large, damaged, or no plain XML.
        """
        if self.sizes[file] > XML_LIMIT:
            raise ProductError("metadata too large", file)
        try:
            if not self.zipped:
                return parse(Path(self.location, file).read_bytes())
            with zipfile.ZipFile(self.location) as archive:
                return parse(archive.read(str(PurePosixPath(self.inside) / file)))
        except (OSError, ValueError, RuntimeError, EOFError, ET.ParseError, zipfile.BadZipFile, zlib.error) as error:
            raise ProductError("metadata that cannot be read; download the product again", f"{file}, {error}") from None

    def truncated(self, files: Iterable[str]) -> list[str]:
        """Those of the files that are empty, or smaller than the product's manifest says."""
        return [file for file in files if self.sizes[file] < max(self._told.get(file, 0), 1)]

    @cached_property
    def _told(self) -> dict[str, int]:
        return _manifest_sizes(self.xml("manifest.safe")) if "manifest.safe" in self.sizes else {}


class _Plain(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Called by the parser before it looks at what is declared."""
        raise ValueError("a document type declaration, which product metadata never have")


def parse(content: bytes) -> ET.Element:
    """The root element of an XML document without document type, and so without entities.

    Raises:
        ValueError, ET.ParseError: it declares a document type, or is damaged.
    """
    return ET.fromstring(content, ET.XMLParser(target=_Plain()))


def local(element: ET.Element) -> str:
    """An element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def _manifest_sizes(manifest: ET.Element) -> dict[str, int]:
    sizes = {}
    for stream in manifest.iter("byteStream"):
        place, size = stream.find("fileLocation"), stream.get("size", "")
        if place is not None and size.isdigit():
            sizes[place.get("href", "").removeprefix("./")] = int(size)
    return sizes


def in_folder(folder: Path) -> Product:
    """The product whose metadata lie in `folder`."""
    sizes = {}
    for here, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in files:
            path = Path(here, name)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return Product(folder.name.removesuffix(".SAFE"), str(folder), "", sizes)


def in_zip(path: Path) -> list[Product]:
    """The products of a zip: its folders that end in .SAFE, or the whole of it when it has none.

    Raises:
        ProductError: it is truncated or no zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ProductError("truncated, or no zip; download it again", str(error)) from None
    tops = sorted({top for name in entries if (top := _safe_folder(name)) is not None}) or [""]
    return [_zipped(path, top, entries) for top in tops]


def _safe_folder(name: str) -> str | None:
    """The innermost folder of a file that ends in .SAFE, if any."""
    parts = PurePosixPath(name).parts
    depths = [depth for depth, part in enumerate(parts[:-1], 1) if part.endswith(".SAFE") and not part.startswith(".")]
    return "/".join(parts[: depths[-1]]) if depths and "__MACOSX" not in parts else None


def _zipped(path: Path, top: str, entries: Mapping[str, int]) -> Product:
    prefix = f"{top}/" if top else ""
    sizes = {name.removeprefix(prefix): size for name, size in entries.items() if name.startswith(prefix)}
    name = (PurePosixPath(top).name if top else path.name.removesuffix(".zip")).removesuffix(".SAFE")
    return Product(name, str(path), top, sizes)
