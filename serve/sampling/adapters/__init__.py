"""Policy adapters: taken off the wire, validated, loaded beside the live version, and unloaded."""
