"""Every metric: its name, kind and labels, what it means, and what to do when it moves.

``docs/metrics.md`` is drawn from it (``python -m kvbelt.ops.draw_metrics docs/metrics.md``). Tests hold it together
with what a running proxy and running workers export, and with the names in deploy/prometheus and deploy/grafana.

Names without ``kvbelt_`` are those that alerts which people have may read. vLLM's own metrics are vLLM's.
"""

from kvbelt.metrics import proxy_rows, worker_rows
from kvbelt.metrics.spec import Kind, Spec

GROUPS = (*proxy_rows.GROUPS, *worker_rows.GROUPS)

CATALOGUE: dict[str, Spec] = {spec.name: spec for group in GROUPS for spec in group.specs}


def spec_of(name: str, kind: Kind) -> Spec:
    """The entry of a metric that is about to be exported.

    Raises:
        LookupError: there is none of this name and kind.
    """
    found = CATALOGUE.get(name)
    if found is None or found.kind is not kind:
        raise LookupError(f"{name} is no {kind} of the catalogue (metrics/catalogue.py)")
    return found
