"""The demo: flows beside simpler models of a table, two moons, digits and a posterior; figures and a short report."""

from pyroflows.demo.part import Part
from pyroflows.demo.report import PARTS, run

__all__ = ["PARTS", "Part", "run"]
