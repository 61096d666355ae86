"""The counter: takes OpenAI requests, sends them to a prefill and a decode worker, relays the answer."""

from kvbelt.proxy.app import Proxy, serve
from kvbelt.proxy.settings import Address, ProxySettings

__all__ = ["Address", "Proxy", "ProxySettings", "serve"]
