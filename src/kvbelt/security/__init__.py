"""Access to the control sockets: keys, the ZAP handler, and counts of refusals."""
