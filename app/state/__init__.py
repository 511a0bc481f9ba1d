"""What happened a moment ago: events, user state, and where they are kept."""
