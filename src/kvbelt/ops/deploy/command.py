"""The command line of ``kvbelt deploy k8s``."""

import argparse
import sys
from pathlib import Path

from kvbelt.ops.arguments import positive_int, positive_number
from kvbelt.ops.deploy.gpus import gpu_named
from kvbelt.ops.deploy.kubernetes import GIB, OverlaySpec, write_overlay
from kvbelt.ops.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="WHERE")
    k8s = kinds.add_parser("k8s", help="write a kustomize overlay for Kubernetes into a folder")
    k8s.set_defaults(run=run, parser=k8s)
    k8s.add_argument("--topology", required=True, help="XpYd, e.g. 4p8d")
    k8s.add_argument("--model", required=True, help="a model hub's name, or a path inside the workers")
    k8s.add_argument("--gpu", required=True, help="a100, b200, h100, h200, l4, l40s, or any")
    k8s.add_argument("--gpus-per-worker", type=positive_int, default=1, metavar="N", help="tensor parallelism")
    k8s.add_argument("--namespace", default="inference", help="default: %(default)s")
    k8s.add_argument("--max-model-len", type=positive_int, default=8192, help="in tokens (default: %(default)s)")
    k8s.add_argument(
        "--send-buffer-gb", type=positive_number, default=1.0, help="per prefill worker, in GiB (default: 1)"
    )
    k8s.add_argument(
        "--receive-buffer-gb", type=positive_number, default=2.0, help="per decode worker, in GiB (default: 2)"
    )
    k8s.add_argument("--model-claim", metavar="PVC", help="a PersistentVolumeClaim to mount at /models")
    k8s.add_argument("--rdma", metavar="RESOURCE", help="KV over RDMA; the device plugin's resource, e.g. rdma/ib")
    k8s.add_argument("--autoscale", choices=["keda", "hpa"], help="between the topology and four times its size")
    k8s.add_argument("--no-monitoring", action="store_true", help="write no ServiceMonitor and PodMonitor")
    k8s.add_argument("--worker-image", default="kvbelt/kvbelt-vllm:0.2.0", help="default: %(default)s")
    k8s.add_argument("--proxy-image", default="kvbelt/kvbelt-proxy:0.2.0", help="default: %(default)s")
    k8s.add_argument("--output", type=Path, metavar="DIR", help="a new folder (default: kvbelt-XpYd)")


def run(args: argparse.Namespace) -> int:
    plan = OverlaySpec(
        topology=Topology.parse(args.topology),
        model=args.model,
        gpu=gpu_named(args.gpu),
        gpus_per_worker=args.gpus_per_worker,
        namespace=args.namespace,
        max_model_len=args.max_model_len,
        send_buffer_bytes=int(args.send_buffer_gb * GIB),
        receive_buffer_bytes=int(args.receive_buffer_gb * GIB),
        model_claim=args.model_claim,
        rdma=args.rdma,
        autoscale=args.autoscale,
        monitoring=not args.no_monitoring,
        worker_image=args.worker_image,
        proxy_image=args.proxy_image,
    )
    folder = args.output or Path(f"kvbelt-{plan.topology}")
    write_overlay(plan, folder)
    for warning in warnings(plan):
        print(f"kvbelt: {warning}", file=sys.stderr)
    print(f"{folder} is written. Make its keys, then apply it:")
    print(f"  kvbelt keys new {folder}/keys && (umask 077; openssl rand -hex 32 > {folder}/keys/admin.key)")
    print(f"  kubectl apply -k {folder}")
    return 0


def warnings(plan: OverlaySpec) -> list[str]:
    """Warnings about settings that are valid but unusual."""
    found = []
    if plan.topology.prefill > plan.topology.decode:
        found.append(f"{plan.topology} has more prefill than decode workers: answers will queue. Usual are 1:1 and 1:2")
    if plan.rdma is None:
        found.append("without --rdma KV crosses from Pod to Pod over TCP, even on one node (docs/kubernetes.md)")
    return found
