"""The proxy: takes OpenAI requests, sends them to a prefill and a decode worker, relays the answer."""

from kvbelt.proxy.app import Proxy
from kvbelt.proxy.settings import Address, ProxySettings

__all__ = ["Address", "Proxy", "ProxySettings"]
