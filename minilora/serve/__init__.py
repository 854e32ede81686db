"""An HTTP server of one base and its adapters."""
