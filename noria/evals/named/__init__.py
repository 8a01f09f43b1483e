"""Sets that come with Noria, asked for by name."""
