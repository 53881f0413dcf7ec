"""Data to fit flows to: toy densities with an exact log-density, tables, their files, images."""

from pyroflows.data.benchmarks import load_bsds300, load_power
from pyroflows.data.images import (
    IMAGES,
    ImageData,
    load_image_folder,
    load_images,
    make_images,
    pad_images,
    random_flips,
    random_shifts,
)
from pyroflows.data.parquet import ParquetBatches
from pyroflows.data.table_files import TableFile, open_table, write_table
from pyroflows.data.tables import TABLES, Table, load_table, make_table
from pyroflows.data.toy import (
    TOY_DENSITIES,
    Checkerboard,
    Circles,
    EightGaussians,
    Pinwheel,
    RandomGaussianMixture,
    Spirals,
    ToyDensity,
    TwoMoons,
)

__all__ = [
    "IMAGES",
    "TABLES",
    "TOY_DENSITIES",
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "ImageData",
    "ParquetBatches",
    "Pinwheel",
    "RandomGaussianMixture",
    "Spirals",
    "Table",
    "TableFile",
    "ToyDensity",
    "TwoMoons",
    "load_bsds300",
    "load_image_folder",
    "load_images",
    "load_power",
    "load_table",
    "make_images",
    "make_table",
    "open_table",
    "pad_images",
    "random_flips",
    "random_shifts",
    "write_table",
]
