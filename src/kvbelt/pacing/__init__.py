"""How long an engine's steps take, and how much of a prompt a step may carry beside running decodes. Pure."""
