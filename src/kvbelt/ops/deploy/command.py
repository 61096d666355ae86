"""The command line of ``kvbelt deploy k8s``."""

import argparse
import sys
from pathlib import Path

from kvbelt.ops.arguments import positive_int, positive_number
from kvbelt.ops.deploy.gpus import gpu_named
from kvbelt.ops.deploy.kubernetes import GIB, PROXY_IMAGE, WORKER_IMAGE, OverlaySpec, write_overlay
from kvbelt.ops.parser import add_examples
from kvbelt.ops.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="WHERE")
    k8s = kinds.add_parser("k8s", help="write a kustomize overlay for Kubernetes into a folder")
    k8s.set_defaults(run=run, parser=k8s)
    k8s.add_argument("--topology", required=True, metavar="XpYd", help="X prefill and Y decode workers")
    k8s.add_argument("--model", required=True, help="a model hub's name, or a path inside the workers")
    k8s.add_argument("--gpu", required=True, help="a100, b200, h100, h200, l4, l40s, or any")
    k8s.add_argument(
        "--gpus-per-worker",
        type=positive_int,
        default=1,
        metavar="N",
        help="GPUs of each worker, which are its tensor-parallel degree",
    )
    k8s.add_argument("--namespace", default="inference", metavar="NAME", help="where everything runs")
    k8s.add_argument(
        "--max-model-len", type=positive_int, default=8192, metavar="TOKENS", help="longest prompt plus answer"
    )
    k8s.add_argument(
        "--send-buffer-gb", type=positive_number, default=1.0, metavar="GIB", help="staging memory of a prefill worker"
    )
    k8s.add_argument(
        "--receive-buffer-gb",
        type=positive_number,
        default=2.0,
        metavar="GIB",
        help="staging memory of a decode worker",
    )
    k8s.add_argument("--model-claim", metavar="PVC", help="a PersistentVolumeClaim to mount at /models (default: none)")
    k8s.add_argument(
        "--rdma", metavar="RESOURCE", help="KV over RDMA: the device plugin's resource, e.g. rdma/ib (default: TCP)"
    )
    k8s.add_argument(
        "--autoscale", choices=["keda", "hpa"], help="between the topology and four times its size (default: no)"
    )
    k8s.add_argument("--no-monitoring", action="store_true", help="write no ServiceMonitor and PodMonitor")
    k8s.add_argument("--worker-image", default=WORKER_IMAGE, metavar="IMAGE", help="of prefill and decode workers")
    k8s.add_argument("--proxy-image", default=PROXY_IMAGE, metavar="IMAGE", help="of the proxy")
    k8s.add_argument("--output", type=Path, metavar="DIR", help="a new folder (default: kvbelt-XpYd)")
    add_examples(
        k8s,
        (
            "kvbelt deploy k8s --topology 2p4d --model meta-llama/Llama-3.1-8B-Instruct --gpu h100",
            "six Pods and a proxy",
        ),
        (
            "kvbelt deploy k8s --topology 2p2d --model /models/llama --model-claim models --gpu any --rdma rdma/ib",
            "over RDMA",
        ),
    )


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
    built = [image for image in (plan.worker_image, plan.proxy_image) if image in (WORKER_IMAGE, PROXY_IMAGE)]
    if built:
        found.append(
            f"no registry has {' and '.join(built)}: build them, push them to yours, and name them there with "
            "--worker-image and --proxy-image (docs/deployment.md)"
        )
    return found
