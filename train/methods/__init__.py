"""How a policy learns: one module per method, on a model whose tower and aligner are frozen and proven so."""
