"""What the OpenAPI document says of our routes. It describes; the handlers alone validate."""
