"""A launcher process over stand-ins, as ``kvbelt up`` is over real ones: argv is the topology and the proxy's port."""

import asyncio
import sys
import tempfile
from pathlib import Path

from kvbelt.errors import KVBeltError
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.topology import Topology
from kvbelt.ops.up import deploy, report

STANDIN = Path(__file__).with_name("standin.py")


async def serve(deployment: Deployment, stop: asyncio.Event) -> int:
    """Log the process's name, and wait."""
    pids = " ".join(str(process.pid) for process in deployment.processes)
    sys.stdout.write(f"pids {pids}\nready {deployment.url}\n")
    sys.stdout.flush()
    await stop.wait()
    return 0


def main() -> int:
    """Run until told to end."""
    with tempfile.TemporaryDirectory() as model:
        spec = DeploymentSpec(
            topology=Topology.parse(sys.argv[1]),
            model=Path(model),
            device="cpu",
            auto_ports=True,
            port=int(sys.argv[2]) or None,
            start_timeout=120,
            command=(sys.executable, "-S", str(STANDIN)),
        )
        try:
            return asyncio.run(deploy(spec, Terminal(), serve))
        except KVBeltError as error:
            return report(error)


if __name__ == "__main__":
    sys.exit(main())
