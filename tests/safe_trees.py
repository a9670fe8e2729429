"""Small Sentinel-2 products as ESA and Sen2Cor lay them out, with real JPEG 2000 files, for the tests of archives.

Element names, attributes and file names follow products of the baselines 02.02 (2016), 02.05 (2017), 03.01 and 05.09.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS

from shards.sensors import SENSORS

L1C, L2A = "s2-l1c", "s2-l2a"
UTM34, ORIGIN = "EPSG:32634", (300000.0, 6100020.0)
SIZE = 96  # pixels of 10 m; 16 of 60 m
NATIVE = {band.name: int(band.resolution) for band in SENSORS[L1C].bands}
ORDER = SENSORS[L1C].band_names  # also that of band_id


def two_digits(band: str) -> str:
    return re.sub(r"^B(\d)$", r"B0\1", band)


def jp2(path: Path, values: np.ndarray, metres: int, origin: tuple[float, float], crs: str = UTM34) -> None:
    """Lossless JPEG 2000 of `values` [C, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", count=values.shape[0], height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, crs=CRS.from_user_input(crs), transform=Affine(metres, 0, origin[0], 0, -metres, origin[1]),
        QUALITY=100, REVERSIBLE="YES", YCBCR420="NO", YCC="NO",
    ) as raster:  # fmt: skip
        raster.write(values)


@dataclass
class Safe:
    """One product. `write` makes it; `numbers` are what its bands then hold.

    Args:
        level: L1C or L2A.
        tile: of the Military Grid Reference System.
        start: of the data take, as in the product's name.
        seen: when the tile was seen.
        baseline: as in the metadata.
        generated: when it was processed, as in the product's name.
        style: "new" (since December 2016), "old" (ESA's naming before it), "sen2cor" (old naming, Level-2A), "2017".
        offset: in the metadata for every band; None for no such list.
        origin: upper left corner in the tile's zone.
    """

    level: str = L1C
    tile: str = "34UCF"
    start: str = "20230823T095559"
    seen: str = "2023-08-23T10:05:35.271949Z"
    baseline: str = "05.09"
    generated: str = "20230823T120234"
    style: str = "new"
    offset: int | None = -1000
    origin: tuple[float, float] = ORIGIN
    quantification: int = 10000
    strip: str = "20230823T095553"
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def bands(self) -> tuple[str, ...]:
        return SENSORS[self.level].band_names

    @property
    def name(self) -> str:
        level = self.level[-3:].upper()
        if self.style in ("new", "2017"):
            baseline = self.baseline.replace(".", "")
            return f"S2B_MSI{level}_{self.start}_N{baseline}_R122_T{self.tile}_{self.generated}.SAFE"
        kind = "OPER" if self.style == "old" else "USER"
        return f"S2A_{kind}_PRD_MSI{level}_PDMC_{self.generated}_R122_V{self.start}_{self.start}.SAFE"

    @property
    def granule_id(self) -> str:
        kind, level = ("USER" if self.style in ("sen2cor", "2017") else "OPER"), self.level[-3:].upper()
        return f"S2A_{kind}_MSI_{level}_TL_SGS__{self.generated}_A033753_T{self.tile}_N{self.baseline}"

    @property
    def granule(self) -> str:
        short = f"{self.level[-3:].upper()}_T{self.tile}_A033753_{self.strip}"
        return f"GRANULE/{short if self.style in ('new', '2017') else self.granule_id}"

    def image(self, band: str, metres: int) -> str:
        """Path of a band, or of SCL, below the product's folder, without .jp2."""
        if self.style in ("new", "2017"):
            stem = f"{'L2A_' if self.style == '2017' else ''}T{self.tile}_{self.start}_{two_digits(band)}"
            folder, end = (f"R{metres}m/", f"_{metres}m") if self.level == L2A else ("", "")
            return f"{self.granule}/IMG_DATA/{folder}{stem}{end}"
        stem = self.granule_id.removesuffix(f"_N{self.baseline}")
        if self.level == L1C:
            return f"{self.granule}/IMG_DATA/{stem}_{two_digits(band)}"
        if band == "SCL":
            return f"{self.granule}/IMG_DATA/{stem.replace('_MSI_', '_SCL_')}_{metres}m"
        return f"{self.granule}/IMG_DATA/R{metres}m/{stem}_{two_digits(band)}_{metres}m"

    def images(self) -> list[tuple[str, int]]:
        """Bands and resolutions that the metadata list."""
        if self.level == L1C:
            return [(band, NATIVE[band]) for band in self.bands]
        copies = [(band, metres) for metres in (60, 20, 10) for band in self.bands if NATIVE[band] <= metres]
        return [*copies, ("SCL", 20), ("SCL", 60)]

    def write(self, root: Path, *, mask: np.ndarray | None = None, seed: int = 0) -> Path:
        """Make the product below `root`. `mask`: SCL codes [48, 48] at 20 m, or MSK_CLASSI [3, 16, 16] at 60 m."""
        folder = root / self.name
        rng = np.random.default_rng(seed)
        for band, metres in self.images():
            count = SIZE * 10 // metres
            values = rng.integers(1, 9000, (1, count, count)).astype(np.uint16)
            if band == "SCL":
                values = np.full((1, count, count), 4, np.uint8)
                if metres == 20 and mask is not None:
                    values = mask[None].astype(np.uint8)
            elif metres == NATIVE[band]:
                self.numbers[band] = values[0]
            jp2(folder / f"{self.image(band, metres)}.jp2", values, metres, self.origin)
        if self.level == L1C and mask is not None:
            jp2(folder / self.granule / "QI_DATA/MSK_CLASSI_B00.jp2", mask.astype(np.uint8), 60, self.origin)
        self.write_metadata(folder)
        return folder

    def write_metadata(self, folder: Path) -> None:
        level = self.level[-3:].upper()
        if self.style in ("new", "2017"):
            own, tile = f"MTD_MSI{level}.xml", "MTD_TL.xml"
        else:
            kind = "OPER" if self.style == "old" else "USER"
            own = f"S2A_{kind}_MTD_SAF{level}_PDMC_{self.generated}_R122_V{self.start}_{self.start}.xml"
            tile = f"{self.granule_id.removesuffix(f'_N{self.baseline}').replace('_MSI_', '_MTD_')}.xml"
        (folder / own).write_text(self.metadata(), encoding="utf-8")
        (folder / self.granule / tile).write_text(self.tile_metadata(), encoding="utf-8")
        (folder / "manifest.safe").write_text(self.manifest(folder), encoding="utf-8")

    def metadata(self) -> str:
        sen2cor = self.style in ("sen2cor", "2017")
        pre, suffix = ("L2A_", "_2A") if sen2cor else ("", "")
        day, clock = self.start[:8], self.start[9:]
        start = f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}.024Z"
        strip = f"S2A_OPER_MSI_{self.level[-3:].upper()}_DS_SGS__{self.generated}_S{self.strip}_N{self.baseline}"
        element = ("IMAGE_FILE" if self.style in ("new", "2017") else "IMAGE_ID") + suffix
        names = [self.image(band, metres) for band, metres in self.images()]
        if self.style not in ("new", "2017"):
            names = [name.rpartition("/")[2] for name in names]
        images = "".join(f"<{element}>{name}</{element}>" for name in names)
        granule = "Granule" if self.style in ("new", "2017") else "Granules"
        level = {L1C: "Level-1C", L2A: "Level-2Ap" if sen2cor else "Level-2A"}[self.level]
        return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:{level}_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_{level}.xsd">
<n1:General_Info><{pre}Product_Info>
<PRODUCT_START_TIME>{start}</PRODUCT_START_TIME>
<PROCESSING_LEVEL>{level}</PROCESSING_LEVEL><PROCESSING_BASELINE>{self.baseline}</PROCESSING_BASELINE>
<GENERATION_TIME>{self.generated}</GENERATION_TIME>
<Datatake datatakeIdentifier="GS2B_{self.start}_033753_N{self.baseline}">
<DATATAKE_SENSING_START>{start}</DATATAKE_SENSING_START></Datatake>
<{pre}Product_Organisation><Granule_List>
<{granule} datastripIdentifier="{strip}" granuleIdentifier="{self.granule_id}" imageFormat="JPEG2000">
{images}</{granule}>
</Granule_List></{pre}Product_Organisation></{pre}Product_Info>
<{pre}Product_Image_Characteristics>{self.radiometry(sen2cor)}</{pre}Product_Image_Characteristics>
</n1:General_Info></n1:{level}_User_Product>
"""

    def radiometry(self, sen2cor: bool) -> str:
        value = f'unit="none">{self.quantification}'
        if self.level == L1C:
            text, name, group = (
                f"<QUANTIFICATION_VALUE {value}</QUANTIFICATION_VALUE>",
                "RADIO_ADD_OFFSET",
                "Radiometric_Offset_List",
            )
        else:
            element = "L2A_BOA_QUANTIFICATION_VALUE" if sen2cor else "BOA_QUANTIFICATION_VALUE"
            text, name, group = (
                f"<L1C_TOA_QUANTIFICATION_VALUE>1</L1C_TOA_QUANTIFICATION_VALUE><{element} {value}</{element}>",
                "BOA_ADD_OFFSET",
                "BOA_ADD_OFFSET_VALUES_LIST",
            )
        if self.offset is None:
            return text
        # Each band its own, so that a wrong order is seen.
        offsets = [f'<{name} band_id="{i}">{self.offset - i}</{name}>' for i in range(len(ORDER))]
        return f"{text}<{group}>{''.join(offsets)}</{group}>"

    def tile_metadata(self) -> str:
        return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<n1:Level-1C_Tile_ID xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/S2_PDI_Level-1C_Tile_Metadata.xsd">
<n1:General_Info><TILE_ID metadataLevel="Brief">{self.granule_id}</TILE_ID>
<SENSING_TIME metadataLevel="Standard">{self.seen}</SENSING_TIME></n1:General_Info></n1:Level-1C_Tile_ID>
"""

    def manifest(self, folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        objects = "".join(
            f'<dataObject ID="D{i}"><byteStream mimeType="application/octet-stream" size="{path.stat().st_size}">'
            f'<fileLocation href="./{path.relative_to(folder).as_posix()}" locatorType="URL"/>'
            '<checksum checksumName="SHA3-256">00</checksum></byteStream></dataObject>'
            for i, path in enumerate(files)
        )
        return f"""<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<xfdu:XFDU xmlns:xfdu="urn:ccsds:schema:xfdu:1"><dataObjectSection>{objects}</dataObjectSection></xfdu:XFDU>
"""
