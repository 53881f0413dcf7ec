"""The named flows."""

from pyroflows.models.vectors import glow, iaf, maf, nice, nsf, planar, radial, realnvp

__all__ = ["glow", "iaf", "maf", "nice", "nsf", "planar", "radial", "realnvp"]
