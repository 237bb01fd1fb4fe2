"""The daemon: HTTP and WebSocket over one manager."""
