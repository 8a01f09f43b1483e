"""What is put into vLLM's worker process, beside `serve.release.worker`."""
