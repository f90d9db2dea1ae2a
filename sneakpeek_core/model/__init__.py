"""The causal video transformer: its tree, its forward, its rotary positions, its files."""
