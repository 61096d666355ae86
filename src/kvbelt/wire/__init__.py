"""Every message that crosses a process, and nothing else. Imports none of the other rooms."""
