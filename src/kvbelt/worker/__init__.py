"""One embedded worker process: the OpenAI API, the engine and the belt. Only this package joins them."""
