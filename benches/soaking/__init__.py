"""Parts of `benches/soak`."""
