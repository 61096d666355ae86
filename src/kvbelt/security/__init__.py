"""Who may speak on a control socket: keys, the gate before each listening socket, and what was refused there."""
