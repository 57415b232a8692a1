"""The HTTP side of the service: requests in, answers out, and no model in between."""
