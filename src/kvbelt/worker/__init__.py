"""One embedded worker process: the OpenAI API, the engine and the belt. The only room where they meet."""
