"""Every message that crosses a process, and nothing else. Imports no other package of kvbelt."""
