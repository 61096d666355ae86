"""The catalogue of all metrics (``catalogue.py``) and the rendering of a scrape."""

from kvbelt.metrics.catalogue import CATALOGUE, GROUPS, spec_of
from kvbelt.metrics.families import counter, gauge, histogram, process_families, render, summary
from kvbelt.metrics.histogram import BYTES, LONG_SECONDS, SECONDS, SIGNED_SECONDS, Histogram
from kvbelt.metrics.spec import By, Group, Kind, Spec

__all__ = [
    "BYTES",
    "CATALOGUE",
    "GROUPS",
    "LONG_SECONDS",
    "SECONDS",
    "SIGNED_SECONDS",
    "By",
    "Group",
    "Histogram",
    "Kind",
    "Spec",
    "counter",
    "gauge",
    "histogram",
    "process_families",
    "render",
    "spec_of",
    "summary",
]
