"""Offline: what trains, evaluates and publishes bundles. May import app; app never imports this."""
