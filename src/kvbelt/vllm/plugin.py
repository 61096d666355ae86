"""Registers the connector's name with vLLM (entry point ``vllm.general_plugins``), so that the name alone is enough."""


def register() -> None:
    """Called by vLLM in each of its processes. The connector itself is imported when it is used."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 -- inside vLLM only

    name = "KVBeltConnector"
    # The registry refuses a name that it knows, and vLLM may call a plugin more than once.
    if name not in KVConnectorFactory._registry:  # noqa: SLF001 -- there is no public look-up
        KVConnectorFactory.register_connector(name, "kvbelt.vllm", name)
