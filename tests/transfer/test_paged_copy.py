"""Copies between paged blocks and staging: every byte, and nothing else."""

import threading

import numpy as np
import pytest
import torch

from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.wire.digest import Choice
from kvbelt.wire.ids import TransferId
from kvbelt.wire.layout import KVLayout

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
ORDERS = [[5, 2, 9, 0], [3, 4, 5, 6], [7], [9, 8]]


def finish(*fences):
    """Wait for copies."""
    for fence in fences:
        while not fence.done():
            pass


def make(device, dtype=torch.float32):
    """Two layers of ten blocks, and two staging buffers."""
    layers = [torch.randn(10, 4, 2, 3, 8, device=device).to(dtype) for _ in range(2)]
    send, receive = (torch.zeros(64 << 10, dtype=torch.uint8, device=device) for _ in range(2))
    return layers, send, receive, TorchPagedCopy(layers, send_staging=send, receive_staging=receive)


@pytest.mark.parametrize("block_ids", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_gather_takes_whole_blocks_in_order(device, dtype, block_ids):
    """Block i of the call lies at offset + i * block_bytes."""
    layers, send, _, copy = make(device, dtype)
    block_bytes = copy.block_bytes
    assert block_bytes == 4 * 2 * 3 * 8 * dtype.itemsize
    finish(copy.gather(1, block_ids, 4096, None))
    expected = torch.zeros_like(send)
    expected[4096 : 4096 + len(block_ids) * block_bytes] = layers[1][block_ids].view(torch.uint8).reshape(-1)
    assert torch.equal(send, expected)


@pytest.mark.parametrize("block_ids", ORDERS)
@pytest.mark.parametrize("device", DEVICES)
def test_scatter_fills_these_blocks_of_every_layer_only(device, block_ids):
    """Other blocks keep their bytes."""
    layers, _, receive, copy = make(device)
    receive.random_(0, 256)
    before = [layer.clone().view(torch.uint8) for layer in layers]
    stride = 6 * copy.block_bytes
    finish(*copy.scatter(block_ids, 8192, stride))
    others = [block for block in range(10) if block not in block_ids]
    for number, layer in enumerate(layers):
        after = layer.view(torch.uint8)
        for place, block in enumerate(block_ids):
            start = 8192 + number * stride + place * copy.block_bytes
            assert torch.equal(after[block].reshape(-1), receive[start : start + copy.block_bytes])
        assert torch.equal(after[others], before[number][others])


@pytest.mark.parametrize("block_ids", [[10, 3], [-1, 3], [3, 99]])
def test_block_ids_out_of_range_are_refused(block_ids):
    """They are neither clipped nor wrapped."""
    _, _, _, copy = make("cpu")
    for call in (lambda: copy.gather(0, block_ids, 0, None), lambda: copy.scatter(block_ids, 0, 0)):
        with pytest.raises(ValueError, match="of a pool of 10 blocks"):
            call()


def test_a_run_that_leaves_the_pool_is_refused():
    """Consecutive ids are checked, too."""
    _, _, _, copy = make("cpu")
    with pytest.raises(ValueError, match="of a pool of 10 blocks"):
        copy.gather(0, [8, 9, 10], 0, None)


def test_a_scatter_that_fails_leaves_no_copy_running(monkeypatch):
    """Slot and blocks are then free for other requests."""
    layers, _, receive, copy = make("cpu")
    receive.random_(0, 256)
    begin, submit = threading.Event(), copy._fillers.submit

    def fails_for_the_second_layer(call, into, *args):
        if np.shares_memory(into, layers[1].numpy()):
            begin.set()
            raise RuntimeError("can't start new thread")
        return submit(lambda: (begin.wait(), call(into, *args)))

    monkeypatch.setattr(copy._fillers, "submit", fails_for_the_second_layer)
    with pytest.raises(RuntimeError, match="new thread"):
        copy.scatter([3, 4], 0, 0)
    filled = layers[0].view(torch.uint8)[[3, 4]].reshape(-1)
    assert torch.equal(filled, receive[: filled.numel()])


def test_layers_that_differ_are_refused():
    """A copier has one number of blocks for all layers."""
    with pytest.raises(ValueError, match="layers differ"):
        TorchPagedCopy([torch.zeros(4, 8), torch.zeros(5, 8)], send_staging=None, receive_staging=None)


def test_layers_that_cannot_be_viewed_as_bytes_are_refused():
    """Otherwise a hidden copy would be gathered instead of the pool."""
    with pytest.raises(ValueError, match="not contiguous"):
        TorchPagedCopy([torch.zeros(4, 8, 6).transpose(1, 2)], send_staging=None, receive_staging=None)
    with pytest.raises(ValueError, match="uint8 and flat"):
        TorchPagedCopy([torch.zeros(4, 8)], send_staging=torch.zeros(4), receive_staging=None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("verify", ["sample", "always"])
def test_a_digest_is_the_same_wherever_the_bytes_lie(device, verify):
    """A GPU and the CPU agree for either buffer, in one piece or in several."""
    _, send, receive, copy = make(device)
    send.random_(0, 256)
    receive.copy_(send)
    num_blocks = (64 << 10) // copy.block_bytes
    _, on_cpu, _, reference = make("cpu")
    on_cpu.copy_(send)
    choice = Choice(TransferId("a"), num_blocks, verify)
    for first, count in ((0, num_blocks), (3, 20), (num_blocks - 1, 1)):
        cells = choice.of_run(0, first, count, row=first)
        digests = [copy.digest_sent(0, cells), copy.digest_received(0, cells), reference.digest_sent(0, cells)]
        for digest in digests:
            finish(digest)
        assert len({digest.value() for digest in digests}) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_receive_buffer_is_scattered_from_by_its_number(device):
    """The overflow is region 1."""
    layers = [torch.zeros(10, 64, dtype=torch.uint8, device=device)]
    receive, overflow = torch.zeros(640, dtype=torch.uint8), torch.arange(200, dtype=torch.uint8)
    copy = TorchPagedCopy(layers, None, receive.to(device), overflow)
    finish(*copy.scatter([4], 64, 0, region=1))
    assert torch.equal(layers[0][4].cpu(), overflow[64:128])


CUTS = [range(1), range(2, 3), range(1, 3)]


def make_cut(device, heads, width):
    """Two layers of ten blocks, ``[4, 2, 3 heads, width]`` in words of four bytes, and a copier of some heads."""
    layers = [torch.randint(1 << 30, (10, 4, 2, 3, width), dtype=torch.int32, device=device) for _ in range(2)]
    send, receive = (torch.zeros(64 << 10, dtype=torch.uint8, device=device) for _ in range(2))
    block_bytes = layers[0][0].numel() * 4
    layout = KVLayout(2, 3, width, 16, "int32", "x", block_bytes, head_runs=8)
    whole = TorchPagedCopy(layers, send_staging=send, receive_staging=receive)
    return layers, send, receive, whole.cut(heads, 1, None, layout)


@pytest.mark.parametrize("width", [8, 7], ids=["words", "bytes"])
@pytest.mark.parametrize("heads", CUTS, ids=str)
@pytest.mark.parametrize("block_ids", ORDERS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_some_heads_are_gathered_and_scattered(device, block_ids, heads, width):
    """What lies in staging is a block of these heads alone. All other bytes, of other heads too, stay as they are."""
    layers, send, receive, copy = make_cut(device, heads, width)
    finish(copy.gather(1, block_ids, 4096, None))
    staged = layers[1][block_ids][..., heads.start : heads.stop, :].contiguous()
    expected = torch.zeros_like(send)
    expected[4096 : 4096 + staged.numel() * 4] = staged.view(torch.uint8).reshape(-1)
    assert torch.equal(send, expected)

    before = [layer.clone() for layer in layers]
    receive[8192 : 8192 + 4096] = torch.randint(256, (4096,), dtype=torch.uint8, device=device)
    num_bytes = staged.numel() * 4
    finish(*copy.scatter(block_ids, 8192, num_bytes))
    for number, layer in enumerate(layers):
        start = 8192 + number * num_bytes
        came = receive[start : start + num_bytes].view(torch.int32).view(staged.shape)
        before[number][block_ids, ..., heads.start : heads.stop, :] = came
        assert torch.equal(layer, before[number])


@pytest.mark.parametrize("device", DEVICES)
def test_a_digest_of_some_heads_is_of_their_bytes(device):
    """A block of them has as many bytes as they have."""
    _, send, _, copy = make_cut(device, range(1, 3), 8)
    send.random_(0, 256)
    num_bytes = copy.block_bytes
    assert num_bytes == 4 * 2 * 2 * 8 * 4
    whole = TorchPagedCopy([torch.zeros(4, num_bytes, dtype=torch.uint8)], send.cpu(), None)
    cells = Choice(TransferId("a"), 20, "always").of_run(0, 0, 20)
    digests = [copy.digest_sent(0, cells), whole.digest_sent(0, cells)]
    finish(*digests)
    assert digests[0].value() == digests[1].value()
