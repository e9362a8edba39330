"""Pages to open in a browser: what a run finds and misses. Computed apart from shown."""
