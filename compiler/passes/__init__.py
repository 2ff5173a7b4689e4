"""Graph passes: each file takes a graph and its options and returns a new graph."""
