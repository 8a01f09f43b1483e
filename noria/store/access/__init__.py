"""Who may call the server, and what operators did: the store's keys and its audit log."""

from noria.store.access.audit import AuditStore
from noria.store.access.keys import KeyStore

__all__ = ["AuditStore", "KeyStore"]
