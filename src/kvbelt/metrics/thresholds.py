"""From where on a value is trouble, as the alerts of ``deploy/prometheus`` have it. A test compares the two."""

TTFT_P99_MS = 500.0  #: DisaggHighTTFT
QUEUE = 10  #: requests in a worker's queue: PrefillerOverload, KVBeltDecodeOverload
KV_FREE_RATIO = 0.05  #: of a decode worker, less is trouble: KVBeltDecodeKVFull
TRANSFER_EXPOSED_MS = 500.0  #: of a tenth of the transfers: KVBeltTransferSlow
